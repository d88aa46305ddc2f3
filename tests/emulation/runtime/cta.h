// CTAs and grids on top of fibers.h or threads.h.
//
// `resident` CTAs run side by side and may wait for one another; the others follow, each on the
// threads of one that has ended.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "memory.h"
#ifdef EMULATION_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulation {

struct Grid {
  Dim3 ctas, threads;
  size_t dynamic_shared = 0;  // bytes
  unsigned resident = 1;
};

// What the lanes of one mask hand each other. Two sets of slots: a lane that has read the last
// exchange may write the next one while others still read, and cannot get further ahead.
struct Exchange {
  static constexpr size_t SLOT = 32;  // bytes of a lane; an operand of mma.sync has 24
  Barrier all;
  unsigned round[WARP] = {};
  alignas(16) unsigned char slots[2][WARP][SLOT];
};

struct Warp {
  Lock lock;
  std::map<unsigned, Exchange> exchanges;  // by mask
  std::map<unsigned, Barrier> syncs;
};

struct Cta {
  static constexpr unsigned NAMES = 16;  // barriers 0 to 15

  explicit Cta(const Grid& grid)
      : grid(grid), dynamic_shared(grid.dynamic_shared),
        warps((grid.threads.count() + WARP - 1) / WARP) {}

  // Shared memory holds nothing when a CTA starts.
  void start() {
    dynamic_shared.poison();
    for (auto& [declaration, memory] : static_shared) memory.poison();
  }
  void end() const {
    bool intact = dynamic_shared.intact();
    for (auto& [declaration, memory] : static_shared) intact = intact && memory.intact();
    if (!intact) fail("a write out of the bounds of shared memory");
  }

  const Grid& grid;
  GuardedMemory dynamic_shared;
  std::vector<Warp> warps;
  std::array<Barrier, NAMES> barriers;
  Barrier turn;  // between one CTA and the next on the same threads
  Lock lock;
  std::map<const void*, GuardedMemory> static_shared;  // by declaration
};

// Whether global memory may be touched: see close_global in run().
struct Dependency {
  std::function<void(bool open)> set = [](bool) {};
  bool open = true;

#ifdef EMULATION_THREADS
  void wait() {}
#else
  std::vector<Fiber*> waiting;

  void wait() {
    if (open) return;
    waiting.push_back(scheduler.current());
    scheduler.suspend();
  }
  bool release() {
    if (waiting.empty()) return false;
    set(open = true);
    for (Fiber* fiber : waiting) scheduler.ready(fiber);
    waiting.clear();
    return true;
  }
#endif
};

inline Dependency dependency;

// Runs `kernel` in every thread of the grid. With `close_global`, each CTA starts with global memory
// closed (fibers and one resident CTA only): it opens when no thread can go on without having passed
// cudaGridDependencySynchronize, so that a kernel which reads what its predecessor may still write
// is caught.
inline void run(const Grid& grid, const std::function<void()>& kernel, bool close_global) {
  const unsigned threads = grid.threads.count(), ctas = grid.ctas.count();
  std::vector<std::unique_ptr<Cta>> resident;
  for (unsigned slot = 0; slot < grid.resident; ++slot) resident.push_back(std::make_unique<Cta>(grid));
#ifndef EMULATION_THREADS
  scheduler.when_stuck = [] { return dependency.release(); };
#endif
  execute(grid.resident * threads, [&](unsigned worker, Thread& thread) {
    const unsigned slot = worker / threads;
    Cta& cta = *resident[slot];
    thread.linear = worker % threads;
    thread.index = grid.threads.at(thread.linear);
    thread.cta = &cta;
    for (unsigned c = slot; c < ctas; c += grid.resident) {
      thread.cta_index = grid.ctas.at(c);
      if (thread.linear == 0) {
        cta.start();
        if (close_global) dependency.set(dependency.open = false);
      }
      cta.turn.wait(threads, "start of CTA", c);
      kernel();
      cta.turn.wait(threads, "end of CTA", c);
      if (thread.linear == 0) cta.end();
    }
  });
}

}  // namespace emulation
