// This header has CTAs, clusters and grids on top of fibers.h or threads.h.
//
// `resident` CTAs run side by side and may wait for one another; the others follow, each on the
// threads of one that has ended. The CTAs of a cluster start together, and their shared memory
// lasts until all of them have ended.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "inbox.h"

namespace emulation {

struct Grid {
  Dim3 ctas, threads;
  size_t dynamic_shared = 0;  // This is in bytes.
  unsigned resident = 1;
  unsigned cluster = 1;  // A cluster has so many CTAs, a divisor of `ctas.x` and `resident`.
};

// The lanes of one mask hand each other values by an Exchange. There are two sets of slots, because
// a lane that has read the last exchange may write the next one while others still read; no lane
// can get further ahead.
struct Exchange {
  static constexpr size_t SLOT = 32;  // A lane has so many bytes; an operand of mma.sync has 24.
  Barrier all;
  unsigned round[WARP] = {};
  alignas(16) unsigned char slots[2][WARP][SLOT];
};

struct Warp {
  Lock lock;
  std::map<unsigned, Exchange> exchanges;  // The key is the mask.
  std::map<unsigned, Barrier> syncs;
};

// A Place is in shared memory, and is the same in every CTA of a cluster.
struct Place {
  const void* declaration;  // This is null in dynamic shared memory.
  size_t extent;            // The array has so many bytes.
  size_t offset;

  std::string text() const {
    return "byte " + std::to_string(offset) + " of " + (declaration ? "static" : "dynamic") +
           " shared memory";
  }
};

// A Load is an asynchronous load that has not been waited for.
struct Load {
  static constexpr unsigned BYTES = 16;
  unsigned char* to;
  const unsigned char* from;
  unsigned char data[BYTES];
  unsigned group;
};

// A Member holds what a thread has under way. Only that thread touches its Member.
struct Member {
  unsigned arrivals = 0, waits = 0;  // These count at the cluster barrier.
  Barrier::Opening next{};
  std::vector<Barrier::Opening> passed;  // The start of the cluster is among them.
  unsigned groups = 0;  // So many groups of loads were committed.
  std::vector<Load> loads;
  bool fenced = false;  // A bulk_fence was called since the last wait.
};

struct Cluster;

struct Cta {
  static constexpr unsigned NAMES = 16;  // The barriers are 0 to 15.

  Cta(const Grid& grid, Cluster& cluster, unsigned rank)
      : grid(grid), cluster(cluster), rank(rank), dynamic_shared(grid.dynamic_shared),
        warps((grid.threads.count() + WARP - 1) / WARP), members(grid.threads.count()) {}

  // Shared memory holds nothing when a CTA starts.
  void start() {
    dynamic_shared.poison();
    for (auto& [declaration, memory] : static_shared) memory.poison();
  }
  // A thread that has returned from the kernel calls this.
  void leave(const Member& member) {
    if (!member.loads.empty())
      fail("a thread ends without having waited for its asynchronous loads");
    Unobserved bookkeeping;
    mail.lock.lock();
    ++returned;
    mail.lock.unlock();
  }
  bool ended() const { return returned == grid.threads.count(); }
  void end() {
    bool intact = dynamic_shared.intact();
    for (auto& [declaration, memory] : static_shared) intact = intact && memory.intact();
    if (!intact) fail("a write out of the bounds of shared memory");
    // Messages that nobody waited for came before the end of the CTA only by luck.
    Unobserved bookkeeping;
    for (auto& [address, inbox] : mail.inboxes) {
      if (inbox.brought && inbox.awaited < inbox.phases.ended())
        fail("nobody waits for the %s: what is sent there may come after the CTA has ended",
             inbox.name.c_str());
      // An inbox may be left armed when nothing is sent to it any more.
      if (!inbox.messages.empty())
        fail("nobody waits for the %s: some of a phase has come, and %s", inbox.name.c_str(),
             inbox.lacks().c_str());
    }
    mail.slots.clear();
    mail.inboxes.clear();
    mail.gates.clear();
    returned = 0;
  }

  GuardedMemory& static_array(const void* declaration, size_t bytes) {
    lock.lock();
    GuardedMemory& memory = static_shared.try_emplace(declaration, bytes).first->second;
    lock.unlock();
    return memory;
  }

  // The function returns where in shared memory so many bytes at an address are.
  std::optional<Place> find(const void* address, size_t bytes) {
    const auto* first = static_cast<const unsigned char*>(address);
    const auto offset = [&](const GuardedMemory& memory) { return size_t(first - memory.data()); };
    const auto holds = [&](const GuardedMemory& memory) {
      return memory.holds(first) && memory.holds(first + bytes - 1);
    };
    if (holds(dynamic_shared))
      return Place{nullptr, dynamic_shared.size(), offset(dynamic_shared)};
    std::optional<Place> place;
    lock.lock();
    for (auto& [declaration, memory] : static_shared)
      if (holds(memory)) place = Place{declaration, memory.size(), offset(memory)};
    lock.unlock();
    return place;
  }
  unsigned char* at(const Place& place) {
    if (place.declaration == nullptr) return dynamic_shared.data() + place.offset;
    return static_array(place.declaration, place.extent).data() + place.offset;
  }

  const Grid& grid;
  Cluster& cluster;
  const unsigned rank;  // The CTA has this rank in the cluster.
  GuardedMemory dynamic_shared;
  std::vector<Warp> warps;
  std::array<Barrier, NAMES> barriers;
  Lock lock;
  std::map<const void*, GuardedMemory> static_shared;  // The key is the declaration.
  std::vector<Member> members;
  Mail mail;
  unsigned returned = 0;  // So many threads have returned.
};

struct Cluster {
  explicit Cluster(const Grid& grid) : threads(grid.cluster * grid.threads.count()) {
    for (unsigned rank = 0; rank < grid.cluster; ++rank)
      ctas.push_back(std::make_unique<Cta>(grid, *this, rank));
  }

  const unsigned threads;
  std::vector<std::unique_ptr<Cta>> ctas;
  Barrier barrier;
  Barrier turn;  // This lies between one cluster and the next on the same threads.
};

// Dependency says whether global memory may be touched: see close_global in run().
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

// The function runs `kernel` in every thread of the grid. With `close_global`, each cluster starts
// with global memory closed (fibers and one resident cluster only): the memory opens when no thread
// can go on without having passed cudaGridDependencySynchronize, so that a kernel which reads what
// its predecessor may still write is caught.
inline void run(const Grid& grid, const std::function<void()>& kernel, bool close_global) {
  const unsigned threads = grid.threads.count(), ctas = grid.ctas.count();
  if (ctas % grid.cluster != 0 || grid.resident % grid.cluster != 0)
    fail("%u CTAs, %u of them resident, in clusters of %u", ctas, grid.resident, grid.cluster);
  std::vector<std::unique_ptr<Cluster>> resident;
  for (unsigned slot = 0; slot < grid.resident; slot += grid.cluster)
    resident.push_back(std::make_unique<Cluster>(grid));
#ifndef EMULATION_THREADS
  scheduler.when_stuck = [] { return dependency.release(); };
#endif
  execute(grid.resident * threads, [&](unsigned worker, Thread& thread) {
    const unsigned slot = worker / threads;
    Cluster& cluster = *resident[slot / grid.cluster];
    Cta& cta = *cluster.ctas[slot % grid.cluster];
    thread.linear = worker % threads;
    thread.index = grid.threads.at(thread.linear);
    thread.cta = &cta;
    for (unsigned c = slot; c < ctas; c += grid.resident) {
      thread.cta_index = grid.ctas.at(c);
      if (thread.linear == 0) {
        cta.start();
        if (close_global && cta.rank == 0) dependency.set(dependency.open = false);
      }
      const auto start = cluster.turn.wait(cluster.threads, "start of CTA", c - cta.rank);
      Member& member = cta.members[thread.linear];
      member = {.next = start, .passed = {start}};
      kernel();
      cta.leave(member);
      cluster.turn.wait(cluster.threads, "end of CTA", c - cta.rank);
      past.forget();
      if (thread.linear == 0) cta.end();
    }
  });
}

}  // namespace emulation
