#include "batch.hpp"

#include <algorithm>

#include "reader.hpp"  // Error

namespace fastsafe {

namespace {

// tokens that waiting for a running row must spare before it is worth a step
constexpr Int kWorthWaiting = 8;

}  // namespace

Batch::Batch(Int pages, Int page_tokens, Int rows, bool reuse, bool split, Int turn)
    : pages_(pages, page_tokens),
      page_tokens_(page_tokens),
      turn_(turn),
      reuse_(reuse),
      split_(split),
      rows_(rows) {
  for (Int i = rows; i-- > 0;) free_rows_.push_back(i);
}

Int Batch::add(Int slot, std::uint64_t space, const Token* tokens, Int count, Int limit, Int feed,
               Int keep_from) {
  if (free_rows_.empty()) throw Error("batch: no handle is free");
  const Int handle = free_rows_.back();
  free_rows_.pop_back();
  Row& row = rows_[handle];
  row = Row{};
  row.used = true;
  row.slot = slot;
  row.space = space;
  row.limit = limit;
  row.feed = feed;
  row.keep_from = keep_from;
  row.given = limit ? count : feed;
  row.tokens.assign(tokens, tokens + count);
  return handle;
}

Int Batch::admit(Int handle) {
  Row& row = rows_.at(handle);
  if (!row.used || row.runs) throw Error("batch: no row waits as " + std::to_string(handle));
  const Int known = row.tokens.size(), pages = pages_for(row.limit ? known : row.feed);
  Pages::Match found;
  // the last token is computed in any case: what follows it is asked for
  const Int last = row.limit ? (split_ ? row.given : known) - 1 : row.keep_from;
  if (reuse_) found = pages_.match(row.space, row.tokens.data(), last, step_);
  if (found.soon - found.tokens >= kWorthWaiting) return kSoon;
  Int room = pages_.available();
  for (const Int id : found.pages) room -= pages_.is_idle(id);
  if (found.partial != kNone) room -= pages_.is_idle(found.partial);
  // running rows are about to need pages, too
  if (pages - static_cast<Int>(found.pages.size()) + running() / 4 > room) {
    if (running() || pages > pages_.count()) return kNoRoom;
    found.tokens -= found.tokens % page_tokens_;  // alone: without the page to copy from
    found.partial = kNone;
  }
  for (const Int id : found.pages) pages_.hold(id);
  if (found.partial != kNone) pages_.hold(found.partial);
  row.pages = found.pages;
  row.entered = row.readied = row.pages.size();
  while (static_cast<Int>(row.pages.size()) < pages) row.pages.push_back(pages_.take());
  if (found.partial != kNone)
    copies_.insert(copies_.end(), {found.partial, row.pages[row.entered]});
  row.computed = found.tokens;
  row.expected = known;
  row.chained = reuse_;
  row.runs = true;
  row.drew = false;
  row.stamp = ++stamps_;
  if (row.age == 0) row.age = row.stamp;
  enter(row, split_ || !row.limit ? row.given : known);
  const auto is_before = [this](Int slot, Int other) { return slot < rows_[other].slot; };
  order_.insert(std::upper_bound(order_.begin(), order_.end(), row.slot, is_before), handle);
  return row.computed;
}

// full pages up to token `end` may be found, and those that are computed may be shared
void Batch::enter(Row& row, Int end) {
  for (; row.chained && (row.entered + 1) * page_tokens_ <= end; ++row.entered) {
    const Int i = row.entered, before = i ? row.pages[i - 1] : kNone;
    row.chained = pages_.enter(row.space, before, row.pages[i], &row.tokens[i * page_tokens_]);
    if (!row.chained) break;  // a row beside this one has the same
  }
  const Int computed = std::min(row.entered, row.computed / page_tokens_);
  for (; row.readied < computed; ++row.readied) pages_.set_ready(row.pages[row.readied], step_);
}

// gives the row's pages back, the last first: it is the first to be taken by others
void Batch::stop(Int handle) {
  Row& row = rows_[handle];
  for (Int i = row.pages.size(); i-- > 0;) pages_.release(row.pages[i]);
  row.pages.clear();
  row.computed = row.planned = 0;
  row.runs = false;
  if (!row.limit) {  // it is read again from the beginning
    row.logprobs.clear();
    row.greedy = true;
  }
  order_.erase(std::find(order_.begin(), order_.end(), handle));
}

void Batch::remove(Int handle) {
  if (!rows_.at(handle).used) throw Error("batch: there is no row " + std::to_string(handle));
  if (rows_[handle].runs) stop(handle);
  rows_[handle] = Row{};
  free_rows_.push_back(handle);
}

void Batch::preempt_all() {
  for (std::size_t i = 1; i < copies_.size(); i += 2) pages_.release(copies_[i - 1]);
  copies_.clear();
  while (!order_.empty()) stop(order_.back());
  forget();
}

bool Batch::is_current(Int handle, Int stamp) const {
  return rows_.at(handle).runs && rows_[handle].stamp == stamp;
}

// the youngest rows give way until the row has pages for what is planned, or it is itself stopped
void Batch::make_room(Int handle, Plan& plan) {
  Row& row = rows_[handle];
  const Int pages = pages_for(row.computed + row.planned);
  while (row.runs && static_cast<Int>(row.pages.size()) < pages) {
    if (pages_.available()) {
      row.pages.push_back(pages_.take());
      continue;
    }
    const Int victim = *std::max_element(order_.begin(), order_.end(), [this](Int a, Int b) {
      return rows_[a].age < rows_[b].age;
    });
    if (order_.size() == 1) throw Error("batch: a row needs more pages than there are");
    stop(victim);
    plan.preempted.push_back(victim);
  }
}

void Batch::emit(Int handle, Plan& plan) {
  Row& row = rows_[handle];
  const Int end = row.computed + row.planned, length = feed_end(row);
  Int context = row.given;
  if (turn_ && length > turn_) context = std::max(context, turn_ + 1);
  for (Int p = row.computed; p < end; ++p) {
    const bool kept = row.limit ? p + 1 == length : p >= row.keep_from;
    if (kept) {
      plan.keep.push_back(plan.positions.size());
      plan.kept_handles.push_back(handle);
      plan.kept_stamps.push_back(row.stamp);
      plan.targets.push_back(p + 1 < static_cast<Int>(row.tokens.size()) ? row.tokens[p + 1] : -1);
    }
    plan.token_ids.push_back(p < static_cast<Int>(row.tokens.size()) ? row.tokens[p] : -1);
    plan.positions.push_back(p);
    plan.places.push_back(row.pages[p / page_tokens_] * page_tokens_ + p % page_tokens_);
    plan.context_lens.push_back(std::max(context, p + 1));
  }
  row.computed = end;
  row.planned = 0;
  plan.handles.push_back(handle);
  plan.starts.push_back(plan.positions.size());
  const Int tokens = plan.positions.size(), kept = plan.keep.size();
  if (plan.segments.empty() || plan.segments[plan.segments.size() - 3] != row.slot)
    plan.segments.insert(plan.segments.end(), {row.slot, 0, 0});
  plan.segments[plan.segments.size() - 2] = tokens;
  plan.segments[plan.segments.size() - 1] = kept;
  enter(row, 0);
  if (row.limit && end == length) {
    ++row.expected;
    row.drew = true;
  }
}

Plan Batch::plan(bool prompts, bool decodes, Int budget) {
  ++step_;
  Plan plan;
  plan.starts.push_back(0);
  for (const Int handle : std::vector<Int>(order_)) {
    Row& row = rows_[handle];
    if (!row.runs) continue;  // it gave way
    const Int known = row.tokens.size(), end = feed_end(row);
    if (turn_ && row.limit && !row.turned && end == turn_ + 1 && row.computed == turn_ &&
        row.given <= turn_) {
      row.turned = true;
      row.computed = 0;
    }
    if (end <= row.computed || (row.limit && end >= row.limit)) continue;
    const bool alone = split_ ? row.limit && row.computed >= row.given
                              : row.drew && end == row.computed + 1;
    if (!(alone ? decodes : prompts)) continue;
    row.planned = 1;
    if (!alone) {
      const Int todo = (split_ ? std::min(row.given, known) : known) - row.computed;
      row.planned = std::min({todo, end - row.computed, budget});
      budget -= row.planned;
    }
    make_room(handle, plan);
  }
  for (const Int handle : order_)
    if (rows_[handle].planned) emit(handle, plan);
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
      const Int known = row.tokens.size();
      if (!stops[i] && known < row.limit) {
        if (!split_) enter(row, std::min(known, row.computed));
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
    if (static_cast<Int>(row.logprobs.size()) == row.feed - row.keep_from)
      ended.insert(ended.end(), {handles[i], static_cast<Int>(Ending::read)});
  }
  return ended;
}

std::string Batch::check() const {
  std::vector<Int> refs(pages_.count());
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    const Int places = std::count(order_.begin(), order_.end(), static_cast<Int>(i));
    if (row.runs != places) return "a row runs and is not in the order, or the reverse";
    if (!row.runs && !row.pages.empty()) return "a row that does not run holds pages";
    if (static_cast<Int>(row.pages.size()) < pages_for(row.computed)) return "a row lacks a page";
    for (const Int id : row.pages) ++refs[id];
  }
  for (std::size_t i = 0; i < copies_.size(); i += 2) ++refs[copies_[i]];
  return pages_.check(refs);
}

}  // namespace fastsafe
