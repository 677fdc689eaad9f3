// The rows of a batch that is computed step by step, and the tables of each step: the part of the
// scheduler that runs per token. It has no policy: fastsafe/engine/scheduler.py decides who runs.
//
// Vocabulary
//   row              one request: a prompt to complete, or a sequence to score
//   handle           number of a row in the batch; another row gets it once the row is removed
//   adapter slot     number of a row's adapter in the adapter bank; -1: the base model
//   prompt token     token that the caller gave; `prompt_tokens` counts them
//   sampled token    token that the model added to a row
//   page             keys and values of `page_tokens` consecutive tokens of one row, in every layer
//   cache slot       place of one token in the pages: page * page_tokens + offset in the page
//   prefix           the first tokens of a row; rows with equal prefixes share the pages that hold them
//   cache namespace  rows share pages within one namespace only: an adapter changes keys and values
//   publish          put a full page into the prefix index, where other rows match it
//   cached page      published and computed, but no row holds it; it is evicted when pages run out
//   step             one forward pass over tokens of many rows, packed end to end
//   prefill          compute tokens that are known: prompts, and rows that were preempted
//   decode           compute the token that a row sampled last, in order to sample the next
//   scoring row      row that is computed by prefill alone: the states from token `logits_from` to
//                    token `prefill_until` are kept, and no token is sampled
//   admit            give a waiting row its pages, and let it run
//   preempt          take all pages of a running row; it waits, and is recomputed once admitted again
//   stamp            number of an admission: results of an earlier one are dropped
//   kept token       token whose final hidden state the step returns, to sample from or to score

#pragma once

#include "pages.hpp"

namespace fastsafe {

// The tables of a step. Tokens are packed in the order of their rows, rows by adapter slot.
struct StepPlan {
  std::vector<Int> token_ids, positions;      // [tokens]; id -1: sampled, and not appended yet
  std::vector<Int> cache_slots;               // [tokens], where keys and values are written
  std::vector<Int> context_lens;              // [tokens], row length that chooses the rotation
  std::vector<Int> handles, starts;           // [rows], [rows + 1] first token of each row
  std::vector<Int> keep;                      // [kept] indices of the kept tokens
  std::vector<Int> kept_handles, kept_stamps; // [kept]
  std::vector<Int> targets;                   // [kept] the token that follows; -1: none is known
  std::vector<Int> segments;                  // [n, 3] adapter slot, end of its tokens and of its kept
  std::vector<Int> copies;                    // [n, 2] pages to copy before the step, from and to
  std::vector<Int> preempted;                 // handles
  std::vector<std::int32_t> table;            // [rows, width] the pages of each row
  Int width = 0;
};

enum class Ending { stop, length, error, scored };

class Batch {
 public:
  static constexpr Int kNoRoom = -1, kWaitForPrefix = -2;

  // rows: most rows at once, waiting ones included.
  // prefix_cache: whether rows share the pages of equal prefixes.
  // separate_decode_step: prefill and decode run in steps of different shapes, whose bits may differ;
  //   a sampled token is then always computed by decode, and its pages are never published.
  // recompute_beyond: LongRoPE switches factors at this length, so a longer row is recomputed from
  //   scratch; 0: never.
  Batch(Int pages, Int page_tokens, Int rows, bool prefix_cache, bool separate_decode_step,
        Int recompute_beyond);

  // Adds a waiting row and returns its handle. It samples until it has `max_tokens_total` tokens,
  // prompt included; 0 makes it a scoring row.
  Int add(Int adapter_slot, std::uint64_t cache_namespace, const Token* tokens, Int count,
          Int max_tokens_total, Int prefill_until, Int logits_from);
  // Lets a waiting row run and returns the length of its prefix that is computed already; kNoRoom
  // if pages are short; kWaitForPrefix if a running row is about to compute more of its prefix.
  Int admit(Int handle);
  // Plans the next step: at most `budget` tokens of prefill, and one token per row of decode.
  StepPlan plan(bool prefill, bool decode, Int budget);
  // Appends the sampled token of each row; drops those of rows that were preempted or removed since
  // the step. Returns handles and endings of the rows that ended.
  std::vector<Int> append(Int count, const Int* handles, const Int* stamps, const Int* ids,
                          const float* logprobs, const bool* finite, const bool* stops);
  // Records the log-probability of the next target of each scoring row; returns as append() does.
  std::vector<Int> record(Int count, const Int* handles, const Int* stamps, const float* logprobs,
                          const bool* greedy);
  void remove(Int handle);
  // Preempts every row after a step that failed, and evicts every page: what it wrote is unknown.
  void preempt_all();
  void evict_all() { pages_.evict_all(); }

  const std::vector<Token>& tokens(Int handle) const { return rows_.at(handle).tokens; }
  const std::vector<float>& logprobs(Int handle) const { return rows_.at(handle).logprobs; }
  bool is_greedy(Int handle) const { return rows_.at(handle).greedy; }
  Int running() const { return static_cast<Int>(order_.size()); }
  Int available() const { return pages_.available(); }
  std::string check() const;  // the first inconsistency; empty if there is none

 private:
  struct Row {
    bool in_use = false, running = false;
    bool sampled = false;     // since it was admitted
    bool recomputed = false;  // for the longer rotation
    bool publishes = false;   // false once another row has published the same tokens
    bool greedy = true;       // every target so far was the most likely token
    Int adapter_slot = 0, max_tokens_total = 0, prefill_until = 0, logits_from = 0;
    Int prompt_tokens = 0;
    Int stamp = 0, first_stamp = 0;  // of this admission and of the first; the latest is preempted
    Int computed = 0;                // tokens in the cache once the planned steps have run
    Int known = 0;                   // tokens, with the one that is sampled and not appended yet
    Int planned = 0;                 // tokens of the step that is being planned
    Int published = 0, ready = 0;    // leading pages that others can match, that others can share
    std::uint64_t cache_namespace = 0;
    std::vector<Token> tokens;
    std::vector<float> logprobs;
    std::vector<Int> pages;
  };

  void publish(Row& row, Int end);
  void release_pages(Int handle);
  void allocate_planned(Int handle, StepPlan& plan);
  void write_tables(Int handle, StepPlan& plan);
  bool is_current(Int handle, Int stamp) const;
  Int end_of(const Row& row) const { return row.max_tokens_total ? row.known : row.prefill_until; }
  Int pages_for(Int tokens) const { return (tokens + page_tokens_ - 1) / page_tokens_; }

  Pages pages_;
  Int page_tokens_, recompute_beyond_, step_ = 0, stamps_ = 0;
  bool prefix_cache_, separate_decode_step_;
  std::vector<Row> rows_;
  std::vector<Int> free_rows_;
  std::vector<Int> order_;   // running rows by adapter slot
  std::vector<Int> copies_;  // [n, 2] of the rows that were admitted since the last step
};

}  // namespace fastsafe
