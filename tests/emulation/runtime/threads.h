// Here every CUDA thread is an OS thread, for ThreadSanitizer.
//
// Only what orders memory on the GPU may order it here: __syncthreads, named barriers, __syncwarp,
// cluster barriers, full inboxes, gates and atomics. Shuffles and mma.sync hand over registers and
// order nothing, so they run Unobserved.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../include/runtime.h"

// These are the annotations and fibers of ThreadSanitizer's runtime.
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
// Together these two make ThreadSanitizer forget all accesses to a range.
void __tsan_java_free(unsigned long address, unsigned long bytes);
void __tsan_java_alloc(unsigned long address, unsigned long bytes);
}

namespace emulation {

__thread Thread* running = nullptr;

// A thread waits so long before it reports a deadlock.
inline std::chrono::seconds patience{60};
inline void be_patient(unsigned seconds) { patience = std::chrono::seconds(seconds); }

void yield() { std::this_thread::yield(); }

// Couriers come from the origin: a fiber that has seen nothing but the start of the program.
struct Origin {
  std::mutex mutex;
  void* fiber = nullptr;
};
inline Origin origin;

// The function runs body(worker, thread) in `workers` OS threads until all threads have returned.
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

// While an Unobserved lives, ThreadSanitizer sees neither its thread's accesses nor
// synchronisation.
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

constexpr unsigned NO_ORDER = 1;  // This is a flag of __tsan_switch_to_fiber.

inline void hide(bool yes) {
  (yes ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd)(__FILE__, __LINE__);
  (yes ? AnnotateIgnoreWritesBegin : AnnotateIgnoreWritesEnd)(__FILE__, __LINE__);
}

// The function makes a fiber of ThreadSanitizer that has seen nothing.
inline void* create_fiber() {
  const std::lock_guard<std::mutex> guard(origin.mutex);
  // A fiber is ordered after the one that makes it.
  void* starter = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(origin.fiber, NO_ORDER);
  void* fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(starter, NO_ORDER);
  return fiber;
}

class Phases;
using Ended = std::map<Phases*, unsigned>;  // So many phases of an inbox are known to have ended.

// A Point is an end of waiting. Only the addresses of the first two members count, for
// ThreadSanitizer.
struct Point {
  char memory;  // Who has waited sees what is ordered by this.
  char time;    // For who has waited, what is ordered by this is over: see Past.
  Ended ended;  // Those who came to the point knew this.
};

// Past is what the running thread knows to be over, as against what the thread would see. A thread
// that waits for a message sees what was sent to it and nothing else of the sender; but what the
// sender had read before, and all that the sender knew to have been read, is over. So a slot may be
// written again when its readers are known to have gone on, be it from their messages alone.
// ThreadSanitizer has one order for both, so what an asynchronous operation overwrites is compared
// with the past in another fiber, and forgotten. Messages, barriers and gates hand the past on;
// shuffles and atomics do not.
class Past {
 public:
  Past() = default;
  Past(const Past&) = delete;
  Past& operator=(const Past&) = delete;
  ~Past() {
    if (fiber_ != nullptr) __tsan_destroy_fiber(fiber_);
  }

  // The function makes everything that the thread has done so far part of the past.
  void note();
  void give(Ended& to) const { merge(ended_, to); }
  void take(const Ended& from) { merge(from, ended_); }
  void take(Phases* phases, unsigned ended) { take(Ended{{phases, ended}}); }
  bool knows() const { return !ended_.empty(); }  // The past says more than order does.
  void forget() {
    ended_.clear();
    noted_.clear();
  }
  // The function tells the past to whoever waits at a point. Call note() before.
  void tell(Point& point) const {
    void* thread = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, NO_ORDER);
    AnnotateHappensBefore(__FILE__, __LINE__, &point.time);
    __tsan_switch_to_fiber(thread, NO_ORDER);
  }
  // All accesses to so many bytes, or to their neighbours in 8 aligned bytes, must be over, and are
  // forgotten. Call note() before.
  void overwrite(void* address, size_t bytes) const {
    void* thread = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, NO_ORDER);
    std::memset(address, 0xff, bytes);
    const unsigned long first = reinterpret_cast<unsigned long>(address) & -8ul;
    const unsigned long end = (reinterpret_cast<unsigned long>(address) + bytes + 7) & -8ul;
    __tsan_java_free(first, end - first);
    __tsan_java_alloc(first, end - first);
    __tsan_switch_to_fiber(thread, NO_ORDER);
  }

 private:
  static void merge(const Ended& from, Ended& to) {
    for (const auto& [phases, ended] : from) {
      unsigned& known = to[phases];
      known = std::max(known, ended);
    }
  }

  Ended ended_, noted_;
  void* fiber_ = nullptr;
};
inline thread_local Past past;

// A Barrier is bar.sync and bar.arrive: it opens when `expected` threads have come. All threads
// that come to one opening must expect the same number.
//
// What was done before an opening is ordered before what is done after the opening, and nothing
// else: the mutex goes unobserved, because a thread that is slow to wake takes the mutex after
// others have taken it again.
class Barrier {
 public:
  using Opening = Point*;

  Opening wait(unsigned expected, const char* name, unsigned id = 0, bool orders = true) {
    const Opening opening = arrive(expected, name, id, orders);
    await(opening, name, id);
    return opening;
  }

  // The function returns the opening that this thread helps to bring about, and may await.
  Opening arrive(unsigned expected, const char* name, unsigned id = 0, bool orders = true) {
    std::unique_lock<std::mutex> guard(mutex_, std::defer_lock);
    Opening opening;
    {
      Unobserved bookkeeping;
      guard.lock();
      opening = &openings_.back();
    }
    if (orders) AnnotateHappensBefore(__FILE__, __LINE__, &opening->memory);
    Unobserved bookkeeping;
    if (arrived_ != 0 && expected != expected_)
      fail("%s %u: expects %u threads here and %u elsewhere", name, id, expected, expected_);
    expected_ = expected;
    if (orders) past.give(opening->ended);
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
      past.take(opening->ended);
    }
    AnnotateHappensAfter(__FILE__, __LINE__, &opening->memory);
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned arrived_ = 0, expected_ = 0;
  std::deque<Point> openings_ = std::deque<Point>(1);
};

// Phases are those of an mbarrier, which end one after the other. What was done before order() is
// ordered before what is done after a wait for the same phase, and nothing else.
class Phases {
 public:
  // The function waits until the phase under way has not this parity, and returns how many phases
  // have ended. `lacks` says what is missing, for the message about a deadlock.
  unsigned wait(unsigned parity, const char* name, const std::function<std::string()>& lacks) {
    unsigned ended;
    Point* point = nullptr;
    {
      Unobserved bookkeeping;
      std::unique_lock<std::mutex> guard(mutex_);
      const auto deadline = std::chrono::system_clock::now() + patience;
      while (ended_ % 2 == parity)
        if (changed_.wait_until(guard, deadline) == std::cv_status::timeout && ended_ % 2 == parity)
          fail("deadlock: the %s still waits: %s", name, lacks().c_str());
      ended = ended_;
      if (ended != 0) {
        point = &points_[ended - 1];
        past.take(point->ended);
        past.take(this, ended);
      }
    }
    if (point != nullptr) AnnotateHappensAfter(__FILE__, __LINE__, &point->memory);
    return ended;
  }
  unsigned ended() {
    Unobserved bookkeeping;
    const std::lock_guard<std::mutex> guard(mutex_);
    return ended_;
  }
  void end() {
    Unobserved bookkeeping;
    const std::lock_guard<std::mutex> guard(mutex_);
    ++ended_;
    points_.emplace_back();
    changed_.notify_all();
  }
  // The function is for the phase under way, which the caller keeps from ending meanwhile.
  void order() { AnnotateHappensBefore(__FILE__, __LINE__, &points_.back().memory); }
  // After this, who waits for this phase knows what the running thread knows to be over.
  void tell() {
    past.tell(points_.back());
    Unobserved bookkeeping;
    const std::lock_guard<std::mutex> guard(mutex_);
    past.give(points_.back().ended);
  }
  const Point& point(unsigned phase) {
    Unobserved bookkeeping;
    const std::lock_guard<std::mutex> guard(mutex_);
    return points_[phase];
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned ended_ = 0;
  std::deque<Point> points_ = std::deque<Point>(1);
};

inline void Past::note() {
  if (fiber_ == nullptr) fiber_ = create_fiber();
  void* thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber_, 0);  // The fiber is ordered after the thread.
  hide(true);
  for (const auto& [phases, ended] : ended_) {
    unsigned& noted = noted_[phases];
    if (noted < ended)
      AnnotateHappensAfter(__FILE__, __LINE__, &phases->point(ended - 1).time);
    noted = ended;
  }
  hide(false);
  __tsan_switch_to_fiber(thread, NO_ORDER);
}

// A Courier does what a thread has started and not waited for, as a thread of its own in the eyes
// of ThreadSanitizer. The courier is ordered after the cluster barriers that the starter has
// passed, and not after what the starter did since: so who waits for the courier does not see the
// starter's own accesses. One thread at a time may run a courier.
class Courier {
 public:
  Courier() {
    Unobserved bookkeeping;
    fiber_ = create_fiber();
  }
  Courier(const Courier&) = delete;
  Courier& operator=(const Courier&) = delete;
  ~Courier() { __tsan_destroy_fiber(fiber_); }

  template <class Action>
  void run(const std::vector<Barrier::Opening>& passed, Action action) {
    void* starter = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, NO_ORDER);
    hide(true);  // These are the variables of the starter.
    for (const Barrier::Opening opening : passed)
      AnnotateHappensAfter(__FILE__, __LINE__, &opening->memory);
    action();
    hide(false);
    __tsan_switch_to_fiber(starter, NO_ORDER);
  }
  // ThreadSanitizer sees this of an action.
  static void write(void* to, const void* from, size_t bytes) {
    hide(false);
    std::memcpy(to, from, bytes);
    hide(true);
  }

 private:
  void* fiber_;
};

}  // namespace emulation
