// Threads of the process that share the work of one operation. They wait for a short time without
// sleeping, as a step has hundreds of operations of a fraction of a millisecond.

#pragma once

#include <cstdint>
#include <memory>

namespace fastsafe::cpu {

class Team {
 public:
  // Takes the threads for this caller until the end of the scope. While another caller has them, and
  // for fewer than two, the work is done by the caller alone.
  explicit Team(unsigned threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  unsigned size() const { return size_; }  // threads, the caller's included

  // Calls work(part) once for each part in [0, parts), on any thread; returns when all are done.
  // Throws the first exception of a part.
  template <class Work>
  void run(std::int64_t parts, const Work& work) {
    if (size_ < 2 || parts < 2) {
      for (std::int64_t part = 0; part < parts; ++part) work(part);
      return;
    }
    const auto call = [](const void* context, std::int64_t part) {
      (*static_cast<const Work*>(context))(part);
    };
    run_shared(parts, call, &work);
  }

 private:
  void run_shared(std::int64_t parts, void (*call)(const void*, std::int64_t), const void* context);
  unsigned size_ = 1;
};

}  // namespace fastsafe::cpu
