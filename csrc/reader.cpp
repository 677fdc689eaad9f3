#include "reader.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastsafe {
namespace {

constexpr std::uint64_t kPieceBytes = 8 << 20;  // makes the cost of a system call negligible
constexpr unsigned kMaxThreads = 8;

// New memory is mapped one page per fault: with pages of 2 MiB reading is 4 times as fast (measured:
// 10.7 against 2.7 GB/s, 2 cores, file in the page cache). It is a hint, so failure is no error.
void advise_huge_pages(char* buffer, std::uint64_t capacity) {
#ifdef MADV_HUGEPAGE
  constexpr std::uint64_t kHugePageBytes = 2 << 20, kWorthwhileBytes = 32 << 20;
  if (capacity < kWorthwhileBytes) return;
  const std::uint64_t skip = -reinterpret_cast<std::uintptr_t>(buffer) % kHugePageBytes;
  ::madvise(buffer + skip, capacity - skip, MADV_HUGEPAGE);
#endif
}

Error failed(const std::string& what) { return Error(what + ": " + std::strerror(errno)); }

}  // namespace

File::File(const std::string& path) {
  if (path.find('\0') != std::string::npos) throw Error("path has a NUL byte, expected none");
  // O_NONBLOCK: opening a FIFO must not wait for a writer
  do {
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (descriptor_ < 0 && errno == EINTR);
  if (descriptor_ < 0) throw failed("file cannot be opened");
  if (::fstat(descriptor_, &opened_) == 0 && S_ISREG(opened_.st_mode)) return;
  ::close(descriptor_);
  throw Error("path is a directory, FIFO or device, expected a regular file");
}

File::~File() { ::close(descriptor_); }

void File::read(std::uint64_t offset, char* buffer, std::uint64_t bytes) const {
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor_, buffer, std::min(bytes, kPieceBytes),
                                static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw failed("file cannot be read at byte " + std::to_string(offset));
    if (got == 0) {
      throw Error("file ends at byte " + std::to_string(offset) + ", expected " +
                  std::to_string(size()) + "; it was truncated while being read, read it again");
    }
    offset += static_cast<std::uint64_t>(got);
    buffer += got;
    bytes -= static_cast<std::uint64_t>(got);
  }
}

void File::read_ranges(char* buffer, std::uint64_t capacity, const std::vector<Range>& ranges,
                       unsigned threads) const {
  std::vector<Range> pieces;
  for (Range r : ranges) {
    if (r.bytes > size() || r.file_offset > size() - r.bytes || r.bytes > capacity ||
        r.buffer_offset > capacity - r.bytes) {
      throw Error("range of " + std::to_string(r.bytes) + " bytes at " +
                  std::to_string(r.file_offset) + " is outside the file or the buffer, expected" +
                  " at most " + std::to_string(size()) + " and " + std::to_string(capacity));
    }
    for (; r.bytes > kPieceBytes; r.bytes -= kPieceBytes) {
      pieces.push_back({r.file_offset, r.buffer_offset, kPieceBytes});
      r.file_offset += kPieceBytes;
      r.buffer_offset += kPieceBytes;
    }
    pieces.push_back(r);
  }

  advise_huge_pages(buffer, capacity);
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  auto work = [&] {
    try {
      for (std::size_t i = next++; i < pieces.size(); i = next++) {
        read(pieces[i].file_offset, buffer + pieces[i].buffer_offset, pieces[i].bytes);
      }
    } catch (...) {
      next = pieces.size();  // the other threads stop at their next piece
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };

  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  threads = std::min(threads, kMaxThreads);
  std::uint64_t total = 0;
  for (const Range& piece : pieces) total += piece.bytes;
  // one thread per full piece: starting one for a few kilobytes costs more than it saves
  const std::uint64_t useful = std::max<std::uint64_t>(1, total / kPieceBytes);
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  for (std::uint64_t i = 1; i < std::min<std::uint64_t>(threads, useful); ++i) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // the system has no more threads: this one reads the rest
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
  check_unchanged();
}

void File::check_unchanged() const {
  struct stat now;
  if (::fstat(descriptor_, &now) != 0) throw failed("file cannot be examined");
  if (now.st_size != opened_.st_size || now.st_mtim.tv_sec != opened_.st_mtim.tv_sec ||
      now.st_mtim.tv_nsec != opened_.st_mtim.tv_nsec) {
    throw Error("file was changed by another process while being read; read it again");
  }
}

}  // namespace fastsafe
