// Pages of keys and values: who holds them, and which can be found again.
//
// A page holds the keys and values of some consecutive tokens of one sequence, in every layer. Full
// pages are found by what they follow and the tokens they hold, compared one by one, and are then
// shared by reference; where only the beginning of a page is the same, it is copied.

#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastsafe {

using Int = std::int64_t;
using Token = std::int32_t;
constexpr Int kNone = -1;

class Pages {
 public:
  struct Match {
    std::vector<Int> pages;  // full ones, computed
    Int partial = kNone;     // one whose beginning continues them
    Int tokens = 0;          // of all these
    Int soon = 0;            // tokens that match once running rows have been computed
  };

  Pages(Int count, Int tokens);

  Int available() const { return static_cast<Int>(free_.size()) + cached_; }
  Int count() const { return static_cast<Int>(pages_.size()); }
  bool is_idle(Int id) const { return pages_[id].refs == 0; }
  Int take();  // one of the available
  void hold(Int id);
  void release(Int id);
  // The longest beginning of tokens [0, end) that has been computed in a space, by step `now`.
  Match match(std::uint64_t space, const Token* tokens, Int end, Int now);
  // A full page may be found from now on, though it is shared only when it is ready; `before`: the
  // page that it follows. False where another has the same tokens in the same place.
  bool enter(std::uint64_t space, Int before, Int id, const Token* tokens);
  void set_ready(Int id, Int step);
  void forget();  // pages that nobody holds are not found again
  // What is wrong, given the references that rows hold; empty if nothing.
  std::string check(const std::vector<Int>& refs) const;

 private:
  static constexpr Int kLater = INT64_MAX;
  struct Page {
    Int refs = 0, ready = kLater;  // step that computes it
    std::uint64_t serial = 0, parent_serial = 0, key = 0;  // serial 0: not to be found
    Int parent = kNone, newest_child = kNone, ready_child = kNone;
    Int before = kNone, after = kNone;  // among pages that nobody holds, oldest first
    std::vector<Token> tokens;
  };

  Page& page(Int id) { return id >= 0 ? pages_[id] : roots_[kNone - 1 - id]; }
  Int root(std::uint64_t space);  // what the first page of a sequence follows, below kNone
  Int find(Int parent, const Token* tokens);
  Int common(Int parent, Int child, const Token* tokens, Int count);
  void drop(Page& page);
  void unlist(Int id);

  Int tokens_, cached_ = 0, oldest_ = kNone, newest_ = kNone;
  std::uint64_t serials_ = 0;
  std::vector<Page> pages_, roots_;
  std::unordered_map<std::uint64_t, Int> root_of_, index_;
  std::vector<Int> free_;
};

}  // namespace fastsafe
