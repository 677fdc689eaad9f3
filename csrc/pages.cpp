#include "pages.hpp"

#include <algorithm>

namespace fastsafe {

namespace {

std::uint64_t mix(std::uint64_t x) {  // Steele et al. 2014, SplitMix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

std::uint64_t key_of(std::uint64_t parent_serial, const Token* tokens, Int count) {
  std::uint64_t key = mix(parent_serial);
  for (Int i = 0; i < count; ++i) key = mix(key ^ static_cast<std::uint32_t>(tokens[i]));
  return key;
}

}  // namespace

Pages::Pages(Int count, Int tokens) : tokens_(tokens), pages_(count) {
  // the lowest first, then those that were given back last: little memory is touched
  for (Int i = count; i-- > 0;) free_.push_back(i);
}

Int Pages::take() {
  Int id = oldest_;
  if (free_.empty()) {
    unlist(id);
    drop(pages_[id]);
  } else {
    id = free_.back();
    free_.pop_back();
  }
  pages_[id].refs = 1;
  return id;
}

void Pages::hold(Int id) {
  if (pages_[id].refs++ == 0) unlist(id);
}

void Pages::release(Int id) {
  Page& page = pages_[id];
  if (--page.refs) return;
  if (page.serial == 0 || page.ready == kLater) {
    drop(page);
    free_.push_back(id);
    return;
  }
  page.before = newest_;
  page.after = kNone;
  (newest_ == kNone ? oldest_ : pages_[newest_].after) = id;
  newest_ = id;
  ++cached_;
}

void Pages::unlist(Int id) {
  const Page& page = pages_[id];
  (page.before == kNone ? oldest_ : pages_[page.before].after) = page.after;
  (page.after == kNone ? newest_ : pages_[page.after].before) = page.before;
  --cached_;
}

void Pages::drop(Page& page) {
  if (page.serial) index_.erase(page.key);
  page.serial = 0;
}

void Pages::forget() {
  while (oldest_ != kNone) {
    const Int id = oldest_;
    unlist(id);
    drop(pages_[id]);
    free_.push_back(id);
  }
  if (!index_.empty()) return;
  roots_.clear();
  root_of_.clear();
}

Int Pages::root(std::uint64_t space) {
  const Int next = kNone - 1 - static_cast<Int>(roots_.size());
  const auto [at, is_new] = root_of_.try_emplace(space, next);
  if (is_new) {
    roots_.emplace_back();
    roots_.back().serial = ++serials_;
  }
  return at->second;
}

Int Pages::find(Int parent, const Token* tokens) {
  const std::uint64_t serial = page(parent).serial;
  const auto at = index_.find(key_of(serial, tokens, tokens_));
  if (at == index_.end()) return kNone;
  const Page& found = pages_[at->second];
  if (found.parent_serial != serial) return kNone;
  return std::equal(found.tokens.begin(), found.tokens.end(), tokens) ? at->second : kNone;
}

// how many of `count` tokens a page that follows `parent` begins with
Int Pages::common(Int parent, Int child, const Token* tokens, Int count) {
  if (child == kNone) return 0;
  const Page& found = pages_[child];
  if (found.serial == 0 || found.parent_serial != page(parent).serial) return 0;
  const Token* end = tokens + std::min(count, tokens_);
  return std::mismatch(tokens, end, found.tokens.begin()).first - tokens;
}

Pages::Match Pages::match(std::uint64_t space, const Token* tokens, Int end, Int now) {
  Match match;
  Int parent = root(space), child;
  const auto next = [&](Int begin) {
    return begin + tokens_ <= end ? find(parent, tokens + begin) : kNone;
  };
  while ((child = next(match.tokens)) != kNone && pages_[child].ready <= now) {
    match.pages.push_back(parent = child);
    match.tokens += tokens_;
  }
  match.soon = match.tokens;
  Int ready = page(parent).ready_child;
  if (ready != kNone && pages_[ready].ready > now) ready = kNone;  // it holds other tokens by now
  const Int copied = common(parent, ready, tokens + match.tokens, end - match.tokens);
  if (copied) match.partial = ready;
  match.tokens += copied;
  while ((child = next(match.soon)) != kNone) {
    parent = child;
    match.soon += tokens_;
  }
  const Int newest = page(parent).newest_child;
  match.soon += common(parent, newest, tokens + match.soon, end - match.soon);
  return match;
}

bool Pages::enter(std::uint64_t space, Int before, Int id, const Token* tokens) {
  const Int parent = before == kNone ? root(space) : before;
  const std::uint64_t serial = page(parent).serial, key = key_of(serial, tokens, tokens_);
  if (!index_.try_emplace(key, id).second) return false;
  Page& entered = pages_[id];
  entered.key = key;
  entered.serial = ++serials_;
  entered.parent = parent;
  entered.parent_serial = serial;
  entered.ready = kLater;
  entered.newest_child = entered.ready_child = kNone;
  entered.tokens.assign(tokens, tokens + tokens_);
  page(parent).newest_child = id;
  return true;
}

void Pages::set_ready(Int id, Int step) {
  pages_[id].ready = step;
  page(pages_[id].parent).ready_child = id;
}

std::string Pages::check(const std::vector<Int>& refs) const {
  Int cached = 0, entered = 0, idle = 0;
  for (Int id = oldest_, before = kNone; id != kNone; before = id, id = pages_[id].after, ++cached)
    if (pages_[id].before != before || pages_[id].refs || !pages_[id].serial)
      return "the list of pages that nobody holds is broken";
  for (std::size_t id = 0; id < pages_.size(); ++id) {
    const Page& page = pages_[id];
    if (page.refs != refs[id])
      return "page " + std::to_string(id) + " counts " + std::to_string(page.refs) +
             " references, its rows " + std::to_string(refs[id]);
    idle += page.refs == 0;
    if (!page.serial) continue;
    ++entered;
    const auto at = index_.find(page.key);
    if (at == index_.end() || at->second != static_cast<Int>(id))
      return "page " + std::to_string(id) + " is not found by its key";
  }
  if (cached != cached_ || idle != available()) return "pages are lost";
  return entered == static_cast<Int>(index_.size()) ? "" : "the index holds pages that are gone";
}

}  // namespace fastsafe
