// Every CUDA thread an OS thread, for ThreadSanitizer.
//
// Only what orders memory on the GPU may order it here: __syncthreads, named barriers, __syncwarp,
// cluster barriers, full inboxes and atomics. Shuffles and mma.sync hand over registers and order
// nothing, so they run Unobserved.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "../include/runtime.h"

// The annotations and fibers of ThreadSanitizer's runtime.
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
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

// How long a thread waits before it reports a deadlock.
inline std::chrono::seconds patience{60};
inline void be_patient(unsigned seconds) { patience = std::chrono::seconds(seconds); }

void yield() { std::this_thread::yield(); }

// What couriers come from: a fiber that has seen nothing but the start of the program.
struct Origin {
  std::mutex mutex;
  void* fiber = nullptr;
};
inline Origin origin;

// Runs body(worker, thread) in `workers` OS threads until all have returned.
inline void execute(unsigned workers, const std::function<void(unsigned, Thread&)>& body) {
  origin.fiber = __tsan_create_fiber(0);
  std::vector<std::thread> threads;
  try {
    for (unsigned worker = 0; worker < workers; ++worker)
      threads.emplace_back([worker, &body] {
        Thread thread;
        running = &thread;
        body(worker, thread);
      });
  } catch (const std::system_error& error) {
    fail("%zu of %u threads started: %s", threads.size(), workers, error.what());
  }
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
  using Opening = const uint64_t*;

  Opening wait(unsigned expected, const char* name, unsigned id = 0) {
    const Opening opening = arrive(expected, name, id);
    await(opening, name, id);
    return opening;
  }

  // Returns the opening that this thread helps to bring about, which it may await.
  Opening arrive(unsigned expected, const char* name, unsigned id = 0, bool orders = true) {
    std::unique_lock<std::mutex> guard(mutex_, std::defer_lock);
    Opening opening;
    {
      Unobserved bookkeeping;
      guard.lock();
      opening = &openings_.back();
    }
    if (orders) AnnotateHappensBefore(__FILE__, __LINE__, opening);
    Unobserved bookkeeping;
    if (arrived_ != 0 && expected != expected_)
      fail("%s %u: expects %u threads here and %u elsewhere", name, id, expected, expected_);
    expected_ = expected;
    if (++arrived_ == expected) {
      arrived_ = 0;
      openings_.emplace_back();
      opened_.notify_all();
    }
    guard.unlock();
    return opening;
  }

  void await(Opening opening, const char* name, unsigned id = 0) {
    {
      Unobserved bookkeeping;
      std::unique_lock<std::mutex> guard(mutex_);
      const auto deadline = std::chrono::system_clock::now() + patience;
      while (opening == &openings_.back())
        if (opened_.wait_until(guard, deadline) == std::cv_status::timeout &&
            opening == &openings_.back())
          fail("deadlock: %s %u still waits for %u of %u threads", name, id, expected_ - arrived_,
               expected_);
    }
    AnnotateHappensAfter(__FILE__, __LINE__, opening);
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned arrived_ = 0, expected_ = 0;
  std::deque<uint64_t> openings_ = std::deque<uint64_t>(1);  // only their addresses count
};

// Closed until it is opened, once. What was done before order() is ordered before what is done after
// a wait, and nothing else.
class Gate {
 public:
  // `missing`: the bytes that keep it closed, for the message about a deadlock.
  void wait(const char* name, const unsigned& missing) {
    {
      Unobserved bookkeeping;
      std::unique_lock<std::mutex> guard(mutex_);
      const auto deadline = std::chrono::system_clock::now() + patience;
      while (!open_)
        if (opened_.wait_until(guard, deadline) == std::cv_status::timeout && !open_)
          fail("deadlock: the %s still waits: %u bytes are missing", name, missing);
    }
    AnnotateHappensAfter(__FILE__, __LINE__, this);
  }
  void open() {
    Unobserved bookkeeping;
    const std::lock_guard<std::mutex> guard(mutex_);
    open_ = true;
    opened_.notify_all();
  }
  void order() const { AnnotateHappensBefore(__FILE__, __LINE__, this); }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = false;
};

// Does what a thread has started and not waited for, as a thread of its own in the eyes of
// ThreadSanitizer. It is ordered after the barriers that the starter has passed and not after what
// that one did since: so who waits for the courier does not see the starter's own accesses. One
// thread at a time may run it.
class Courier {
 public:
  Courier() {
    Unobserved bookkeeping;
    const std::lock_guard<std::mutex> guard(origin.mutex);
    // a fiber is ordered after the one that makes it
    void* starter = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(origin.fiber, NO_ORDER);
    fiber_ = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(starter, NO_ORDER);
  }
  Courier(const Courier&) = delete;
  Courier& operator=(const Courier&) = delete;
  ~Courier() { __tsan_destroy_fiber(fiber_); }

  template <class Action>
  void run(const std::vector<Barrier::Opening>& passed, Action action) {
    void* starter = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, NO_ORDER);
    hide(true);  // the variables of the starter
    for (const Barrier::Opening opening : passed)
      AnnotateHappensAfter(__FILE__, __LINE__, opening);
    action();
    hide(false);
    __tsan_switch_to_fiber(starter, NO_ORDER);
  }
  // What ThreadSanitizer sees of an action.
  static void write(void* to, const void* from, size_t bytes) {
    hide(false);
    std::memcpy(to, from, bytes);
    hide(true);
  }

 private:
  static constexpr unsigned NO_ORDER = 1;  // of __tsan_switch_to_fiber

  static void hide(bool yes) {
    (yes ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd)(__FILE__, __LINE__);
    (yes ? AnnotateIgnoreWritesBegin : AnnotateIgnoreWritesEnd)(__FILE__, __LINE__);
  }

  void* fiber_;
};

}  // namespace emulation
