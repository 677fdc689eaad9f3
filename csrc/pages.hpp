// The paged cache's book-keeping: which pages are free, which are shared, and which prefix each holds.
//
// A page holds the keys and values of consecutive tokens of one sequence, in every layer. Full pages
// are indexed by the page before them and by their own tokens, which are compared one by one, and
// are shared by reference. A page of which only the beginning matches is copied instead.

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
    std::vector<Int> pages;  // full pages that match and are computed
    Int partial = kNone;     // computed page whose beginning matches after them
    Int tokens = 0;          // length of the prefix in `pages` and `partial`
    Int pending = 0;         // prefix length that will match when pages now being filled are complete
  };

  Pages(Int count, Int page_tokens);

  Int count() const { return static_cast<Int>(pages_.size()) - 1; }
  // Pages that allocate() can give: free ones, and cached ones, which it evicts.
  Int available() const { return static_cast<Int>(free_.size()) + cached_; }
  bool is_unused(Int id) const { return pages_[id].refs == 0; }
  // Returns a page with one reference; evicts the least recently used cached page if none is free.
  Int allocate();
  void retain(Int id);
  // Drops a reference. A page without any stays cached if its tokens were published and computed.
  void release(Int id);
  // Matches the longest prefix of tokens [0, end) in a cache namespace, as computed by step `now`.
  Match match(std::uint64_t cache_namespace, const Token* tokens, Int end, Int now);
  // Publishes a full page in the prefix index, after page `previous`; it can be matched now and
  // reused once its step has run. Returns false if an identical page is published already.
  bool publish(std::uint64_t cache_namespace, Int previous, Int id, const Token* tokens);
  void set_ready(Int id, Int step);
  void evict_all();
  // Returns the first inconsistency, given the references that rows hold; empty if there is none.
  std::string check(const std::vector<Int>& refs) const;

 private:
  static constexpr Int kNotReady = INT64_MAX;
  struct Page {
    Int refs = 0, ready = kNotReady;  // ready: the step that computes it
    std::uint64_t serial = 0, parent_serial = 0, key = 0;  // serial 0: not published
    Int parent = kNone, newest_child = kNone, ready_child = kNone;
    Int older = kNone, newer = kNone;  // neighbours in the ring of cached pages
    std::vector<Token> tokens;
  };

  Page& page(Int id) { return id >= 0 ? pages_[id] : roots_[kNone - 1 - id]; }
  Int root(std::uint64_t cache_namespace);
  Int find(Int parent, const Token* tokens);
  Int common_tokens(Int parent, Int child, const Token* tokens, Int count);
  Int evict();
  void forget_key(Page& page);
  void add_to_cached(Int id);
  void remove_from_cached(Int id);

  Int oldest() const { return pages_[count()].newer; }

  Int page_tokens_, cached_ = 0;
  std::uint64_t serials_ = 0;
  std::vector<Page> pages_;  // the last one is no page: it closes the ring
  std::vector<Page> roots_;  // parents of the first pages of each namespace
  std::unordered_map<std::uint64_t, Int> root_of_, index_;
  std::vector<Int> free_;
};

}  // namespace fastsafe
