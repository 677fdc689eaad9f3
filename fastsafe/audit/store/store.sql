CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE prompts (
  sha256 TEXT PRIMARY KEY, text TEXT NOT NULL, token_ids BLOB NOT NULL);
CREATE TABLE planned (
  position INTEGER PRIMARY KEY, key TEXT NOT NULL, condition TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('harmful', 'benign', 'utility')), part TEXT NOT NULL,
  system_prompt TEXT NOT NULL, item TEXT NOT NULL, sample INTEGER NOT NULL,
  seed INTEGER NOT NULL, prompt TEXT NOT NULL REFERENCES prompts (sha256),
  max_tokens INTEGER NOT NULL, reference TEXT, tests TEXT, filtered_from TEXT,
  UNIQUE (condition, kind, part, system_prompt, item, sample));
CREATE TABLE adapters (
  condition TEXT PRIMARY KEY, key TEXT NOT NULL, weights_sha256 TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE losses (
  condition TEXT NOT NULL, step INTEGER NOT NULL, loss REAL NOT NULL,
  PRIMARY KEY (condition, step)) WITHOUT ROWID;
CREATE TABLE drift (
  condition TEXT NOT NULL, step INTEGER NOT NULL, format TEXT NOT NULL, n INTEGER NOT NULL,
  kl REAL NOT NULL, margin REAL NOT NULL, stopped INTEGER NOT NULL,
  PRIMARY KEY (condition, step, format)) WITHOUT ROWID;
CREATE TABLE completions (
  key TEXT PRIMARY KEY, text TEXT NOT NULL, token_ids BLOB NOT NULL,
  finish_reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE judgements (
  key TEXT NOT NULL, judge TEXT NOT NULL, identity TEXT NOT NULL, verdict TEXT NOT NULL,
  raw TEXT NOT NULL, score REAL, coherent INTEGER, PRIMARY KEY (key, identity)) WITHOUT ROWID;
CREATE TABLE guards (
  key TEXT NOT NULL, target TEXT NOT NULL CHECK (target IN ('prompt', 'answer')),
  identity TEXT NOT NULL, verdict TEXT NOT NULL, raw TEXT NOT NULL, score REAL,
  PRIMARY KEY (key, target, identity)) WITHOUT ROWID;
CREATE TABLE utility (
  key TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL,
  PRIMARY KEY (key, metric)) WITHOUT ROWID;
CREATE TABLE events (
  id INTEGER PRIMARY KEY, at TEXT NOT NULL, stage TEXT NOT NULL, detail TEXT NOT NULL);
