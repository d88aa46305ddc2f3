// Here every CUDA thread is a fiber of one OS thread: runs are deterministic, and a barrier costs a
// jump a thread.
//
// makecontext gives a fiber its stack; after that fibers change with _setjmp and _longjmp, which
// make no system call. A fiber runs until it waits. The run queue is first in, first out.
#pragma once

#include <csetjmp>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "../include/runtime.h"

namespace emulation {

// A Stack grows down to a page that nobody may touch.
class Stack {
 public:
  static constexpr size_t SIZE = 256 * 1024, GUARD = 4096;

  Stack() : base_(mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (base_ == MAP_FAILED || mprotect(base_, GUARD, PROT_NONE) != 0) fail("no memory for a stack");
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(base_, SIZE); }
  void* base() const { return base_; }

 private:
  void* base_;
};

struct Fiber : Thread {
  std::jmp_buf registers;
  ucontext_t start;
  Stack stack;
  const char* waits_for = nullptr;  // A waiting fiber names its barrier, inbox or gate.
  unsigned barrier = 0;
  const std::function<std::string()>* lacks = nullptr;  // An inbox or a gate waits for this.
};

class Scheduler {
 public:
  // The scheduler calls this when no fiber can run; it returns whether it made one ready.
  std::function<bool()> when_stuck = [] { return false; };

  void ready(Fiber* fiber) { queue_.push_back(fiber); }

  // The function gives control back to execute(), and returns when the running fiber's turn comes
  // again.
  void suspend() {
    if (_setjmp(current()->registers) == 0) _longjmp(registers_, 1);
  }

  Fiber* current() const { return static_cast<Fiber*>(running); }

  // The function runs body(worker, thread) in `workers` fibers until all fibers have returned.
  void execute(unsigned workers, const std::function<void(unsigned, Thread&)>& body) {
    std::vector<std::unique_ptr<Fiber>> fibers(workers);
    body_ = &body;
    live_ = workers;
    for (auto& fiber : fibers) {
      fiber = std::make_unique<Fiber>();
      getcontext(&fiber->start);
      fiber->start.uc_stack.ss_sp = fiber->stack.base();
      fiber->start.uc_stack.ss_size = Stack::SIZE;
      makecontext(&fiber->start, &Scheduler::enter, 0);
      // The first jump into a fiber cannot be a _longjmp, so the fiber runs up to its own _setjmp
      // now.
      running = fiber.get();
      if (_setjmp(registers_) == 0) setcontext(&fiber->start);
    }
    while (live_ != 0) {
      if (queue_.empty() && !when_stuck()) report_deadlock(fibers);
      running = queue_.front();
      queue_.pop_front();
      if (_setjmp(registers_) == 0) _longjmp(current()->registers, 1);
    }
    running = nullptr;
  }

 private:
  static void enter();

  [[noreturn]] void report_deadlock(const std::vector<std::unique_ptr<Fiber>>& fibers) {
    // Fibers that wait for bytes are reported first, because the others wait for them.
    for (auto& fiber : fibers)
      if (fiber->lacks != nullptr) {
        running = fiber.get();
        fail("deadlock: %u threads wait and none can run; one waits for the %s: %s", live_,
             fiber->waits_for, (*fiber->lacks)().c_str());
      }
    for (auto& fiber : fibers)
      if (fiber->waits_for != nullptr) {
        running = fiber.get();
        fail("deadlock: %u threads wait and none can run; one waits for %s %u", live_,
             fiber->waits_for, fiber->barrier);
      }
    fail("deadlock");
  }

  std::jmp_buf registers_;
  std::deque<Fiber*> queue_;
  const std::function<void(unsigned, Thread&)>* body_ = nullptr;
  unsigned live_ = 0, entered_ = 0;
};

inline Scheduler scheduler;

Thread* running = nullptr;

inline void Scheduler::enter() {
  const unsigned worker = scheduler.entered_++;
  scheduler.ready(scheduler.current());
  scheduler.suspend();
  (*scheduler.body_)(worker, *running);
  --scheduler.live_;
  _longjmp(scheduler.registers_, 1);
}

void yield() {
  scheduler.ready(scheduler.current());
  scheduler.suspend();
}

inline void be_patient(unsigned) {}  // Nobody waits here: a deadlock is seen at once.

inline void execute(unsigned workers, const std::function<void(unsigned, Thread&)>& body) {
  scheduler.execute(workers, body);
}

// A Barrier is bar.sync and bar.arrive: it opens when `expected` threads have come. All threads
// that come to one opening must expect the same number.
class Barrier {
 public:
  using Opening = unsigned;  // So many openings came before it.

  Opening wait(unsigned expected, const char* name, unsigned id = 0, bool = true) {
    const Opening opening = arrive(expected, name, id);
    await(opening, name, id);
    return opening;
  }
  // The function returns the opening to await; only threads.h needs to know whether an arrival
  // orders memory.
  Opening arrive(unsigned expected, const char* name, unsigned id = 0, bool = true) {
    if (arrived_ != 0 && expected != expected_)
      fail("%s %u: expects %u threads here and %u elsewhere", name, id, expected, expected_);
    expected_ = expected;
    const Opening opening = openings_;
    if (++arrived_ == expected) {
      arrived_ = 0;
      ++openings_;
      for (Fiber* fiber : waiting_) scheduler.ready(fiber);
      waiting_.clear();
    }
    return opening;
  }
  void await(Opening opening, const char* name, unsigned id = 0) {
    if (opening != openings_) return;
    Fiber* fiber = scheduler.current();
    fiber->waits_for = name;
    fiber->barrier = id;
    waiting_.push_back(fiber);
    scheduler.suspend();
    fiber->waits_for = nullptr;
  }

 private:
  unsigned arrived_ = 0, expected_ = 0;
  Opening openings_ = 0;
  std::vector<Fiber*> waiting_;
};

// Phases are those of an mbarrier, which end one after the other.
class Phases {
 public:
  // The function waits until the phase under way has not this parity, and returns how many phases
  // have ended. `lacks` says what is missing, for the message about a deadlock.
  unsigned wait(unsigned parity, const char* name, const std::function<std::string()>& lacks) {
    Fiber* fiber = scheduler.current();
    while (ended_ % 2 == parity) {
      fiber->waits_for = name;
      fiber->lacks = &lacks;
      waiting_.push_back(fiber);
      scheduler.suspend();
    }
    fiber->waits_for = nullptr;
    fiber->lacks = nullptr;
    return ended_;
  }
  unsigned ended() const { return ended_; }
  void end() {
    ++ended_;
    for (Fiber* fiber : waiting_) scheduler.ready(fiber);
    waiting_.clear();
  }
  // Only threads.h needs what orders memory and what tells of the past.
  void order() {}
  void tell() {}

 private:
  unsigned ended_ = 0;
  std::vector<Fiber*> waiting_;
};

// One OS thread needs no lock, and nothing watches the thread: see threads.h.
struct Lock {
  void lock() {}
  void unlock() {}
};
struct Unobserved {
  Unobserved() {}
  ~Unobserved() {}
};
class Courier {
 public:
  template <class Action>
  void run(const std::vector<Barrier::Opening>&, Action action) {
    action();
  }
  static void write(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
};
struct Past {
  void note() {}
  bool knows() const { return false; }
  void forget() {}
  void overwrite(void*, size_t) {}
};
inline Past past;

}  // namespace emulation
