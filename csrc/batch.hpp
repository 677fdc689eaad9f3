// The rows of a batch that is computed step by step, and the tables of a step: the part of the
// scheduler that runs per token. No policy: fastsafe/engine/scheduler.py says who runs.

#pragma once

#include "pages.hpp"

namespace fastsafe {

// A step: packed tokens in the order of their rows, rows sorted by adapter slot.
struct Plan {
  std::vector<Int> token_ids, positions, places, context_lens;  // [tokens]; place: in the pages
  std::vector<Int> handles, starts;                             // [rows], [rows + 1]
  std::vector<Int> keep, kept_handles, kept_stamps, targets;    // [kept]; target -1: none
  std::vector<Int> segments;            // [n, 3] adapter slot, end of its tokens, end of its kept
  std::vector<Int> copies;              // [n, 2] pages, copied before the step
  std::vector<Int> preempted;           // handles
  std::vector<std::int32_t> table;      // [rows, width] pages
  Int width = 0;
};

enum class Ending { stop, length, error, read };

class Batch {
 public:
  static constexpr Int kNoRoom = -1, kSoon = -2;

  // At most `rows` rows. `reuse`: look for pages computed before. `split`: prompts and drawn tokens
  // are computed by different steps, whose bits may differ: a drawn token is always computed alone,
  // and is not found by others. `turn`: a row that grows beyond this length is computed anew, as
  // its rotation changes (longrope); 0: none.
  Batch(Int pages, Int page_tokens, Int rows, bool reuse, bool split, Int turn);

  // A row that does not run yet; its handle. It draws tokens until there are `limit`; with limit 0
  // it is only read: `feed` tokens are computed, and states from `keep_from` on are kept. Rows of
  // one `space` may share pages.
  Int add(Int slot, std::uint64_t space, const Token* tokens, Int count, Int limit, Int feed,
          Int keep_from);
  // How many of its tokens need not be computed; kNoRoom; or kSoon where a running row is about to
  // have computed the beginning of this one.
  Int admit(Int handle);
  // The next step: at most `budget` tokens of prompts, and one for each row that has drawn one,
  // or one of both. A drawn token that nobody has told yet is -1.
  Plan plan(bool prompts, bool decodes, Int budget);
  // Takes the drawn token of each row; what belongs to a row that has left its place is dropped.
  // Returns handles and endings of the rows that ended.
  std::vector<Int> append(Int count, const Int* handles, const Int* stamps, const Int* ids,
                          const float* logprobs, const bool* finite, const bool* stops);
  // Takes the log-probability of one more target of each row that is only read.
  std::vector<Int> record(Int count, const Int* handles, const Int* stamps, const float* logprobs,
                          const bool* greedy);
  void remove(Int handle);  // gives back its pages and the handle
  void preempt_all();       // the last step does not count: all pages are given back and forgotten
  void forget() { pages_.forget(); }

  const std::vector<Token>& tokens(Int handle) const { return rows_.at(handle).tokens; }
  const std::vector<float>& logprobs(Int handle) const { return rows_.at(handle).logprobs; }
  bool is_greedy(Int handle) const { return rows_.at(handle).greedy; }
  Int running() const { return static_cast<Int>(order_.size()); }
  Int available() const { return pages_.available(); }
  std::string check() const;  // what is wrong with the accounts; empty if nothing

 private:
  struct Row {
    bool used = false, runs = false, drew = false, turned = false, chained = false, greedy = true;
    Int slot = 0, limit = 0, feed = 0, keep_from = 0, given = 0;  // given: the prompt's length
    Int stamp = 0, age = 0;  // of this admission, of the first
    Int computed = 0, expected = 0, planned = 0;
    Int entered = 0, readied = 0;  // pages that can be found, that can be shared
    std::uint64_t space = 0;
    std::vector<Token> tokens;
    std::vector<float> logprobs;
    std::vector<Int> pages;
  };

  void enter(Row& row, Int end);
  void stop(Int handle);
  Int feed_end(const Row& row) const { return row.limit ? row.expected : row.feed; }
  Int pages_for(Int tokens) const { return (tokens + page_tokens_ - 1) / page_tokens_; }
  bool is_current(Int handle, Int stamp) const;
  void make_room(Int handle, Plan& plan);
  void emit(Int handle, Plan& plan);

  Pages pages_;
  Int page_tokens_, turn_, step_ = 0, stamps_ = 0;
  bool reuse_, split_;
  std::vector<Row> rows_;
  std::vector<Int> free_rows_, order_, copies_;
};

}  // namespace fastsafe
