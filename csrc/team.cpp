#include "team.hpp"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace fastsafe::cpu {

namespace {

constexpr int kSpins = 2000;  // some 50 to 100 microseconds
constexpr int kHelperBits = 16;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Never destroyed: its threads sleep until the process ends.
class Pool {
 public:
  std::mutex owner;  // held by the Team that has the threads

  // Returns how many of the `wanted` threads there are: the system may refuse more.
  unsigned grow(unsigned wanted) {
    try {
      while (threads_ < wanted) {
        std::thread(&Pool::serve, this, threads_, generation_.load()).detach();
        ++threads_;
      }
    } catch (const std::system_error&) {
    }
    return threads_ < wanted ? threads_ : wanted;
  }

  void run(unsigned helpers, std::int64_t parts, void (*call)(const void*, std::int64_t),
           const void* context) {
    call_ = call;
    context_ = context;
    parts_ = parts;
    next_ = 0;
    busy_ = helpers;
    generation_ = ((generation_ >> kHelperBits) + 1) << kHelperBits | helpers;
    if (sleeping_ > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work();
    for (int spins = 0; busy_ > 0; ++spins) spins < kSpins ? pause() : std::this_thread::yield();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void work() {
    for (std::int64_t part; (part = next_++) < parts_;) {
      try {
        call_(context_, part);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  void serve(unsigned index, std::uint64_t seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_ == seen; ++spins) pause();
      if (generation_ == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;  // before it looks again: a caller that adds work sees one of the two
        wake_.wait(lock, [&] { return generation_ != seen; });
        --sleeping_;
      }
      seen = generation_;
      if (index < (seen & ((1u << kHelperBits) - 1))) {
        work();
        --busy_;
      }
    }
  }

  std::mutex mutex_;  // of the sleepers and the error
  std::condition_variable wake_;
  // Number of the work, then its helpers. In one word, so that a thread that is late for work without
  // it cannot mistake the helpers of the next one for its own.
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<unsigned> busy_{0};
  std::atomic<std::int64_t> next_{0};
  std::int64_t parts_ = 0;
  void (*call_)(const void*, std::int64_t) = nullptr;
  const void* context_ = nullptr;
  std::exception_ptr error_;
  unsigned threads_ = 0;
};

Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

Team::Team(unsigned threads) {
  if (threads < 2 || !pool().owner.try_lock()) return;
  size_ = 1 + pool().grow(threads - 1);
  if (size_ < 2) pool().owner.unlock();
}

Team::~Team() {
  if (size_ > 1) pool().owner.unlock();
}

void Team::run_shared(std::int64_t parts, void (*call)(const void*, std::int64_t),
                      const void* context) {
  pool().run(size_ - 1, parts, call, context);
}

}  // namespace fastsafe::cpu
