#include "batch.hpp"

#include <algorithm>

#include "reader.hpp"  // Error

namespace fastsafe {

namespace {

// prefix tokens that waiting for a running row must save before it is worth a step
constexpr Int kWorthWaiting = 8;

}  // namespace

Batch::Batch(Int pages, Int page_tokens, Int rows, bool prefix_cache, bool separate_decode_step,
             Int recompute_beyond)
    : pages_(pages, page_tokens),
      page_tokens_(page_tokens),
      recompute_beyond_(recompute_beyond),
      prefix_cache_(prefix_cache),
      separate_decode_step_(separate_decode_step),
      rows_(rows) {
  for (Int i = rows; i-- > 0;) free_rows_.push_back(i);
}

Int Batch::add(Int adapter_slot, std::uint64_t cache_namespace, const Token* tokens, Int count,
               Int max_tokens_total, Int prefill_until, Int logits_from) {
  if (free_rows_.empty()) throw Error("batch: no handle is free");
  const Int handle = free_rows_.back();
  free_rows_.pop_back();
  Row& row = rows_[handle];
  row = Row{};
  row.in_use = true;
  row.adapter_slot = adapter_slot;
  row.cache_namespace = cache_namespace;
  row.max_tokens_total = max_tokens_total;
  row.prefill_until = prefill_until;
  row.logits_from = logits_from;
  row.prompt_tokens = max_tokens_total ? count : prefill_until;
  row.tokens.assign(tokens, tokens + count);
  return handle;
}

// Who owns which pages once a row is admitted, and what must happen to them:
//
//   index in row.pages       owner                           duty
//   [0, matched)             every row that shares them      retain; nobody writes them again
//   matched, when a page     this row                        allocate; the next step begins with a
//     matches in part                                        copy of that page into it
//   the others               this row                        allocate; its own steps write them
//   [0, published)           as above, in the prefix index   publish once the page's tokens are known
//   [0, ready)               as above, computed              set_ready once a step has written it
//   the page copied from     its own rows; it is not in      retain here, release in plan(): it must
//     (match.partial)        row.pages                       not be evicted before it is copied
//
// All of row.pages is released when the row is preempted or removed.
Int Batch::admit(Int handle) {
  Row& row = rows_.at(handle);
  if (!row.in_use || row.running)
    throw Error("batch: no row waits with handle " + std::to_string(handle));
  const Int known = row.tokens.size();
  const Int needed = pages_for(row.max_tokens_total ? known : row.prefill_until);
  // the state of the last token is always needed, so it is computed even where its page matches
  const Int last =
      row.max_tokens_total ? (separate_decode_step_ ? row.prompt_tokens : known) - 1 : row.logits_from;
  Pages::Match match;
  if (prefix_cache_) match = pages_.match(row.cache_namespace, row.tokens.data(), last, step_);
  if (match.pending - match.tokens >= kWorthWaiting) return kWaitForPrefix;
  Int room = pages_.available();
  for (const Int id : match.pages) room -= pages_.is_unused(id);
  if (match.partial != kNone) room -= pages_.is_unused(match.partial);
  // a quarter of the running rows are assumed to need a page soon
  if (needed - static_cast<Int>(match.pages.size()) + running() / 4 > room) {
    if (running() || needed > pages_.count()) return kNoRoom;
    // the row has the batch to itself, and needs the page that it would copy from
    match.tokens -= match.tokens % page_tokens_;
    match.partial = kNone;
  }
  for (const Int id : match.pages) pages_.retain(id);
  if (match.partial != kNone) pages_.retain(match.partial);
  row.pages = match.pages;
  row.published = row.ready = row.pages.size();
  while (static_cast<Int>(row.pages.size()) < needed) row.pages.push_back(pages_.allocate());
  if (match.partial != kNone)
    copies_.insert(copies_.end(), {match.partial, row.pages[row.published]});
  row.computed = match.tokens;
  row.known = known;
  row.publishes = prefix_cache_;
  row.running = true;
  row.sampled = false;
  row.stamp = ++stamps_;
  if (row.first_stamp == 0) row.first_stamp = row.stamp;
  publish(row, separate_decode_step_ || !row.max_tokens_total ? row.prompt_tokens : known);
  const auto is_before = [this](Int slot, Int other) { return slot < rows_[other].adapter_slot; };
  order_.insert(std::upper_bound(order_.begin(), order_.end(), row.adapter_slot, is_before), handle);
  return row.computed;
}

// publishes the full pages of tokens [0, end), and marks those that are computed as ready
void Batch::publish(Row& row, Int end) {
  for (; row.publishes && (row.published + 1) * page_tokens_ <= end; ++row.published) {
    const Int i = row.published, previous = i ? row.pages[i - 1] : kNone;
    const Token* tokens = &row.tokens[i * page_tokens_];
    row.publishes = pages_.publish(row.cache_namespace, previous, row.pages[i], tokens);
    if (!row.publishes) break;
  }
  const Int computed = std::min(row.published, row.computed / page_tokens_);
  for (; row.ready < computed; ++row.ready) pages_.set_ready(row.pages[row.ready], step_);
}

// The last page is released first, and so evicted first: fewer rows share it than the first one.
void Batch::release_pages(Int handle) {
  Row& row = rows_[handle];
  for (Int i = row.pages.size(); i-- > 0;) pages_.release(row.pages[i]);
  row.pages.clear();
  row.computed = row.planned = 0;
  row.running = false;
  if (!row.max_tokens_total) {  // all its targets will be scored again
    row.logprobs.clear();
    row.greedy = true;
  }
  order_.erase(std::find(order_.begin(), order_.end(), handle));
}

void Batch::remove(Int handle) {
  if (!rows_.at(handle).in_use)
    throw Error("batch: no row has handle " + std::to_string(handle));
  if (rows_[handle].running) release_pages(handle);
  rows_[handle] = Row{};
  free_rows_.push_back(handle);
}

void Batch::preempt_all() {
  for (std::size_t i = 0; i < copies_.size(); i += 2) pages_.release(copies_[i]);
  copies_.clear();
  while (!order_.empty()) release_pages(order_.back());
  evict_all();
}

bool Batch::is_current(Int handle, Int stamp) const {
  return rows_.at(handle).running && rows_[handle].stamp == stamp;
}

// Allocates the pages of a row's planned tokens. Rows that were first admitted last are preempted
// until there are enough; the row itself may be among them.
void Batch::allocate_planned(Int handle, StepPlan& plan) {
  Row& row = rows_[handle];
  const Int needed = pages_for(row.computed + row.planned);
  while (row.running && static_cast<Int>(row.pages.size()) < needed) {
    if (pages_.available()) {
      row.pages.push_back(pages_.allocate());
      continue;
    }
    const Int youngest = *std::max_element(order_.begin(), order_.end(), [this](Int a, Int b) {
      return rows_[a].first_stamp < rows_[b].first_stamp;
    });
    if (order_.size() == 1) throw Error("batch: a row needs more pages than there are");
    release_pages(youngest);
    plan.preempted.push_back(youngest);
  }
}

void Batch::write_tables(Int handle, StepPlan& plan) {
  Row& row = rows_[handle];
  const Int begin = row.computed, end = begin + row.planned, length = end_of(row);
  const Int appended = row.tokens.size();
  Int context = row.prompt_tokens;
  if (recompute_beyond_ && length > recompute_beyond_)
    context = std::max(context, recompute_beyond_ + 1);
  for (Int p = begin; p < end; ++p) {
    const bool kept = row.max_tokens_total ? p + 1 == length : p >= row.logits_from;
    if (kept) {
      plan.keep.push_back(plan.positions.size());
      plan.kept_handles.push_back(handle);
      plan.kept_stamps.push_back(row.stamp);
      plan.targets.push_back(p + 1 < appended ? row.tokens[p + 1] : -1);
    }
    plan.token_ids.push_back(p < appended ? row.tokens[p] : -1);
    plan.positions.push_back(p);
    plan.cache_slots.push_back(row.pages[p / page_tokens_] * page_tokens_ + p % page_tokens_);
    plan.context_lens.push_back(std::max(context, p + 1));
  }
  row.computed = end;
  row.planned = 0;
  plan.handles.push_back(handle);
  plan.starts.push_back(plan.positions.size());
  const Int tokens = plan.positions.size(), kept = plan.keep.size();
  if (plan.segments.empty() || plan.segments[plan.segments.size() - 3] != row.adapter_slot)
    plan.segments.insert(plan.segments.end(), {row.adapter_slot, 0, 0});
  plan.segments[plan.segments.size() - 2] = tokens;
  plan.segments[plan.segments.size() - 1] = kept;
  publish(row, 0);
  if (row.max_tokens_total && end == length) {
    ++row.known;
    row.sampled = true;
  }
}

StepPlan Batch::plan(bool prefill, bool decode, Int budget) {
  ++step_;
  StepPlan plan;
  plan.starts.push_back(0);
  for (const Int handle : std::vector<Int>(order_)) {
    Row& row = rows_[handle];
    if (!row.running) continue;  // preempted in this loop
    const Int appended = row.tokens.size(), end = end_of(row);
    if (recompute_beyond_ && row.max_tokens_total && !row.recomputed &&
        end == recompute_beyond_ + 1 && row.computed == recompute_beyond_ &&
        row.prompt_tokens <= recompute_beyond_) {
      row.recomputed = true;
      row.computed = 0;
    }
    if (end <= row.computed || (row.max_tokens_total && end >= row.max_tokens_total)) continue;
    const bool decodes = separate_decode_step_
                             ? row.max_tokens_total && row.computed >= row.prompt_tokens
                             : row.sampled && end == row.computed + 1;
    if (!(decodes ? decode : prefill)) continue;
    row.planned = 1;
    if (!decodes) {
      const Int until = separate_decode_step_ ? std::min(row.prompt_tokens, appended) : appended;
      row.planned = std::min({until - row.computed, end - row.computed, budget});
      budget -= row.planned;
    }
    allocate_planned(handle, plan);
  }
  for (const Int handle : order_)
    if (rows_[handle].planned) write_tables(handle, plan);
  for (const Int handle : plan.handles)
    plan.width = std::max(plan.width, static_cast<Int>(rows_[handle].pages.size()));
  plan.table.resize(plan.handles.size() * plan.width);
  for (std::size_t i = 0; i < plan.handles.size(); ++i) {
    const std::vector<Int>& pages = rows_[plan.handles[i]].pages;
    std::copy(pages.begin(), pages.end(), plan.table.begin() + i * plan.width);
  }
  plan.copies.swap(copies_);
  for (std::size_t i = 0; i < plan.copies.size(); i += 2) pages_.release(plan.copies[i]);
  return plan;
}

std::vector<Int> Batch::append(Int count, const Int* handles, const Int* stamps, const Int* ids,
                               const float* logprobs, const bool* finite, const bool* stops) {
  std::vector<Int> ended;
  for (Int i = 0; i < count; ++i) {
    if (!is_current(handles[i], stamps[i])) continue;
    Row& row = rows_[handles[i]];
    Ending ending = Ending::error;
    if (finite[i]) {
      row.tokens.push_back(static_cast<Token>(ids[i]));
      if (logprobs) row.logprobs.push_back(std::min(logprobs[i], 0.0f));
      const Int length = row.tokens.size();
      if (!stops[i] && length < row.max_tokens_total) {
        if (!separate_decode_step_) publish(row, std::min(length, row.computed));
        continue;
      }
      ending = stops[i] ? Ending::stop : Ending::length;
    }
    ended.insert(ended.end(), {handles[i], static_cast<Int>(ending)});
  }
  return ended;
}

std::vector<Int> Batch::record(Int count, const Int* handles, const Int* stamps,
                               const float* logprobs, const bool* greedy) {
  std::vector<Int> ended;
  for (Int i = 0; i < count; ++i) {
    if (!is_current(handles[i], stamps[i])) continue;
    Row& row = rows_[handles[i]];
    row.logprobs.push_back(std::min(logprobs[i], 0.0f));
    row.greedy = row.greedy && greedy[i];
    if (static_cast<Int>(row.logprobs.size()) == row.prefill_until - row.logits_from)
      ended.insert(ended.end(), {handles[i], static_cast<Int>(Ending::scored)});
  }
  return ended;
}

std::string Batch::check() const {
  std::vector<Int> refs(pages_.count());
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    if (row.running != std::count(order_.begin(), order_.end(), static_cast<Int>(i)))
      return "a row runs and is not in the order, or the reverse";
    if (!row.running && !row.pages.empty()) return "a row that does not run holds pages";
    if (static_cast<Int>(row.pages.size()) < pages_for(row.computed)) return "a row lacks a page";
    for (const Int id : row.pages) ++refs[id];
  }
  for (std::size_t i = 0; i < copies_.size(); i += 2) ++refs[copies_[i]];
  return pages_.check(refs);
}

}  // namespace fastsafe
