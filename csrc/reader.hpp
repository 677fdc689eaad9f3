// Reads bytes of a regular file with pread into memory that the caller owns.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastsafe {

// The message says in one sentence what is wrong and what to do; for a file, the caller adds its path.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Range {
  std::uint64_t file_offset;
  std::uint64_t buffer_offset;
  std::uint64_t bytes;
};

// An open regular file. It is not mapped: a file that shrinks meanwhile is an Error, not a SIGBUS.
class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::uint64_t size() const { return static_cast<std::uint64_t>(opened_.st_size); }

  // Fills buffer[0, bytes) from `offset`, or throws.
  void read(std::uint64_t offset, char* buffer, std::uint64_t bytes) const;

  // Fills every range, with up to `threads` threads (0: one per core, at most 8). A range must lie
  // inside the file and inside buffer[0, capacity).
  void read_ranges(char* buffer, std::uint64_t capacity, const std::vector<Range>& ranges,
                   unsigned threads) const;

 private:
  // Throws when size or modification time differ from when the file was opened.
  void check_unchanged() const;

  int descriptor_;
  struct stat opened_;
};

}  // namespace fastsafe
