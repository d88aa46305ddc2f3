// Every CUDA thread an OS thread, for ThreadSanitizer.
//
// Only what orders memory on the GPU may order it here: __syncthreads, named barriers, __syncwarp and
// atomics. Shuffles and mma.sync hand over registers and order nothing, so they run Unobserved.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "model.h"

// The annotations of ThreadSanitizer's runtime.
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
}

namespace emulation {

inline thread_local Thread* running = nullptr;

inline Thread* self() { return running; }

// Lets the others run: called in loops that wait for a value in memory.
inline void yield() { std::this_thread::yield(); }

// Runs body(worker, thread) in `workers` OS threads until all have returned.
inline void execute(unsigned workers, const std::function<void(unsigned, Thread&)>& body) {
  std::vector<std::thread> threads;
  for (unsigned worker = 0; worker < workers; ++worker)
    threads.emplace_back([worker, &body] {
      Thread thread;
      running = &thread;
      body(worker, thread);
    });
  for (std::thread& thread : threads) thread.join();
}

// bar.sync and bar.arrive: opens when `expected` threads have come. All that come to one opening must
// expect the same number.
class Barrier {
 public:
  void wait(unsigned expected, const char* name, unsigned id = 0) {
    std::unique_lock<std::mutex> guard(mutex_);
    const unsigned long opening = openings_;
    if (come(expected, name, id)) return;
    const auto deadline = std::chrono::system_clock::now() + PATIENCE;
    while (openings_ == opening)
      if (opened_.wait_until(guard, deadline) == std::cv_status::timeout && openings_ == opening)
        fail("deadlock: %s %u still waits for %u of %u threads", name, id, expected - arrived_, expected);
  }
  void arrive(unsigned expected, const char* name, unsigned id = 0) {
    std::unique_lock<std::mutex> guard(mutex_);
    come(expected, name, id);
  }

 private:
  static constexpr std::chrono::seconds PATIENCE{60};

  bool come(unsigned expected, const char* name, unsigned id) {
    if (arrived_ != 0 && expected != expected_)
      fail("%s %u: expects %u threads here and %u elsewhere", name, id, expected, expected_);
    expected_ = expected;
    if (++arrived_ < expected) return false;
    arrived_ = 0;
    ++openings_;
    opened_.notify_all();
    return true;
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned arrived_ = 0, expected_ = 0;
  unsigned long openings_ = 0;
};

using Lock = std::mutex;

// While it lives, ThreadSanitizer sees neither this thread's accesses nor its synchronisation.
struct Unobserved {
  Unobserved() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  }
  ~Unobserved() {
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

}  // namespace emulation
