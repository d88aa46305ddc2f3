// Every CUDA thread an OS thread, for ThreadSanitizer.
//
// Only what orders memory on the GPU may order it here: __syncthreads, named barriers, __syncwarp and
// atomics. Shuffles and mma.sync hand over registers and order nothing, so they run Unobserved.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "../include/runtime.h"

// The annotations of ThreadSanitizer's runtime.
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateHappensBefore(const char* file, int line, const volatile void* address);
void AnnotateHappensAfter(const char* file, int line, const volatile void* address);
}

namespace emulation {

__thread Thread* running = nullptr;

void yield() { std::this_thread::yield(); }

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

// bar.sync and bar.arrive: opens when `expected` threads have come. All that come to one opening must
// expect the same number.
//
// What was done before an opening is ordered before what is done after it, and nothing else: the mutex
// goes unobserved, because a thread that is slow to wake takes it after others have taken it again.
class Barrier {
 public:
  void wait(unsigned expected, const char* name, unsigned id = 0) {
    std::unique_lock<std::mutex> guard(mutex_, std::defer_lock);
    const uint64_t* opening = enter(guard);
    {
      Unobserved bookkeeping;
      if (!come(expected, name, id)) {
        const auto deadline = std::chrono::system_clock::now() + PATIENCE;
        while (opening == &openings_.back())
          if (opened_.wait_until(guard, deadline) == std::cv_status::timeout &&
              opening == &openings_.back())
            fail("deadlock: %s %u still waits for %u of %u threads", name, id, expected - arrived_,
                 expected);
      }
      guard.unlock();
    }
    AnnotateHappensAfter(__FILE__, __LINE__, opening);
  }
  void arrive(unsigned expected, const char* name, unsigned id = 0) {
    std::unique_lock<std::mutex> guard(mutex_, std::defer_lock);
    enter(guard);
    Unobserved bookkeeping;
    come(expected, name, id);
    guard.unlock();
  }

 private:
  static constexpr std::chrono::seconds PATIENCE{60};

  // Takes the mutex; returns the opening that this thread helps to bring about.
  const uint64_t* enter(std::unique_lock<std::mutex>& guard) {
    const uint64_t* opening;
    {
      Unobserved bookkeeping;
      guard.lock();
      opening = &openings_.back();
    }
    AnnotateHappensBefore(__FILE__, __LINE__, opening);
    return opening;
  }

  bool come(unsigned expected, const char* name, unsigned id) {
    if (arrived_ != 0 && expected != expected_)
      fail("%s %u: expects %u threads here and %u elsewhere", name, id, expected, expected_);
    expected_ = expected;
    if (++arrived_ < expected) return false;
    arrived_ = 0;
    openings_.emplace_back();
    opened_.notify_all();
    return true;
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned arrived_ = 0, expected_ = 0;
  std::deque<uint64_t> openings_ = std::deque<uint64_t>(1);  // only their addresses count
};

}  // namespace emulation
