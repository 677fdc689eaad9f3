"""Tasks, formats, judges, mitigations and statistics: from prompts to rates.

Nothing here imports the engine or the trainer: every part runs on a CPU with plain strings.
"""
