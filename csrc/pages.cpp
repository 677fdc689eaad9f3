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

Pages::Pages(Int count, Int page_tokens) : page_tokens_(page_tokens), pages_(count + 1) {
  pages_[count].older = pages_[count].newer = count;
  // a stack: the lowest pages and those released last are reused first, so little memory is touched
  for (Int i = count; i-- > 0;) free_.push_back(i);
}

Int Pages::allocate() {
  if (free_.empty()) free_.push_back(evict());
  const Int id = free_.back();
  free_.pop_back();
  pages_[id].refs = 1;
  return id;
}

// takes the least recently used cached page out of the prefix index
Int Pages::evict() {
  const Int id = oldest();
  remove_from_cached(id);
  forget_key(pages_[id]);
  return id;
}

void Pages::evict_all() {
  while (cached_) free_.push_back(evict());
  if (!index_.empty()) return;
  roots_.clear();
  root_of_.clear();
}

void Pages::retain(Int id) {
  if (pages_[id].refs++ == 0) remove_from_cached(id);
}

void Pages::release(Int id) {
  Page& page = pages_[id];
  if (--page.refs) return;
  if (page.serial == 0 || page.ready == kNotReady) {
    forget_key(page);
    free_.push_back(id);
  } else {
    add_to_cached(id);
  }
}

void Pages::add_to_cached(Int id) {
  Page& end = pages_[count()];
  pages_[id].older = end.older;
  pages_[id].newer = count();
  pages_[end.older].newer = id;
  end.older = id;
  ++cached_;
}

void Pages::remove_from_cached(Int id) {
  pages_[pages_[id].older].newer = pages_[id].newer;
  pages_[pages_[id].newer].older = pages_[id].older;
  --cached_;
}

void Pages::forget_key(Page& page) {
  if (page.serial) index_.erase(page.key);
  page.serial = 0;
}

// the parent of a namespace's first pages; its id is below kNone
Int Pages::root(std::uint64_t cache_namespace) {
  const Int next = kNone - 1 - static_cast<Int>(roots_.size());
  const auto [entry, is_new] = root_of_.try_emplace(cache_namespace, next);
  if (is_new) {
    roots_.emplace_back();
    roots_.back().serial = ++serials_;
  }
  return entry->second;
}

// the published page that follows `parent` and holds these tokens; kNone if there is none
Int Pages::find(Int parent, const Token* tokens) {
  const std::uint64_t serial = page(parent).serial;
  const auto entry = index_.find(key_of(serial, tokens, page_tokens_));
  if (entry == index_.end()) return kNone;
  const Page& child = pages_[entry->second];
  if (child.parent_serial != serial) return kNone;
  return std::equal(child.tokens.begin(), child.tokens.end(), tokens) ? entry->second : kNone;
}

// how many of `count` tokens are the first ones of `child`, if it still follows `parent`
Int Pages::common_tokens(Int parent, Int child, const Token* tokens, Int count) {
  if (child == kNone) return 0;
  const Page& candidate = pages_[child];
  if (candidate.serial == 0 || candidate.parent_serial != page(parent).serial) return 0;
  const Token* end = tokens + std::min(count, page_tokens_);
  return std::mismatch(tokens, end, candidate.tokens.begin()).first - tokens;
}

Pages::Match Pages::match(std::uint64_t cache_namespace, const Token* tokens, Int end, Int now) {
  Match match;
  Int parent = root(cache_namespace), child;
  const auto next = [&](Int begin) {
    return begin + page_tokens_ <= end ? find(parent, tokens + begin) : kNone;
  };
  while ((child = next(match.tokens)) != kNone && pages_[child].ready <= now) {
    match.pages.push_back(child);
    match.tokens += page_tokens_;
    parent = child;
  }
  match.pending = match.tokens;
  Int ready = page(parent).ready_child;
  // the page may have been evicted and published again, with tokens that are not computed yet
  if (ready != kNone && pages_[ready].ready > now) ready = kNone;
  const Int copied = common_tokens(parent, ready, tokens + match.tokens, end - match.tokens);
  if (copied) match.partial = ready;
  match.tokens += copied;
  while ((child = next(match.pending)) != kNone) {
    parent = child;
    match.pending += page_tokens_;
  }
  const Int newest = page(parent).newest_child;
  match.pending += common_tokens(parent, newest, tokens + match.pending, end - match.pending);
  return match;
}

bool Pages::publish(std::uint64_t cache_namespace, Int previous, Int id, const Token* tokens) {
  const Int parent = previous == kNone ? root(cache_namespace) : previous;
  const std::uint64_t serial = page(parent).serial, key = key_of(serial, tokens, page_tokens_);
  if (!index_.try_emplace(key, id).second) return false;
  Page& published = pages_[id];
  published.key = key;
  published.serial = ++serials_;
  published.parent = parent;
  published.parent_serial = serial;
  published.ready = kNotReady;
  published.newest_child = published.ready_child = kNone;
  published.tokens.assign(tokens, tokens + page_tokens_);
  page(parent).newest_child = id;
  return true;
}

void Pages::set_ready(Int id, Int step) {
  pages_[id].ready = step;
  page(pages_[id].parent).ready_child = id;
}

std::string Pages::check(const std::vector<Int>& refs) const {
  Int cached = 0, published = 0, unused = 0;
  for (Int id = oldest(); id != count(); id = pages_[id].newer, ++cached)
    if (pages_[pages_[id].newer].older != id || pages_[id].refs || !pages_[id].serial)
      return "the ring of cached pages is broken";
  for (Int id = 0; id < count(); ++id) {
    const Page& page = pages_[id];
    if (page.refs != refs[id])
      return "page " + std::to_string(id) + " counts " + std::to_string(page.refs) +
             " references, its rows " + std::to_string(refs[id]);
    unused += page.refs == 0;
    if (!page.serial) continue;
    ++published;
    const auto entry = index_.find(page.key);
    if (entry == index_.end() || entry->second != id)
      return "the prefix index lacks page " + std::to_string(id);
  }
  if (cached != cached_ || unused != available()) return "an unused page is neither free nor cached";
  return published == static_cast<Int>(index_.size()) ? "" : "the prefix index has evicted pages";
}

}  // namespace fastsafe
