// This header has TileLang's device templates (tl_templates/cuda: common.h, cluster.h, reduce.h,
// atomic.h), as far as kernels use them. Reductions add in the same order as on the GPU.
#pragma once

#include "cuda.h"

namespace tl {

inline void __sync_thread_partial(int barrier, int threads) {
  emulation::wait_at_barrier(barrier, threads);
}
inline void __named_barrier_arrive(int barrier, int threads) {
  emulation::arrive_at_barrier(barrier, threads);
}

inline void cluster_arrive() { emulation::arrive_at_cluster(true); }
inline void cluster_arrive_relaxed() { emulation::arrive_at_cluster(false); }
inline void cluster_wait() { emulation::wait_for_cluster(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
inline int block_rank_in_cluster() { return emulation::rank_in_cluster(); }

// This is setmaxnreg, which sets the registers of a thread.
template <uint32_t registers>
void warpgroup_reg_alloc() {
  if (registers < 24 || registers > 256 || registers % 8 != 0)
    emulation::fail("setmaxnreg: %u registers, expected a multiple of 8 from 24 to 256", registers);
}
template <uint32_t registers>
void warpgroup_reg_dealloc() {
  warpgroup_reg_alloc<registers>();
}

struct SumOp {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct MaxOp {
  template <class T>
  T operator()(T a, T b) const {
    return max(a, b);
  }
};
struct MinOp {
  template <class T>
  T operator()(T a, T b) const {
    return min(a, b);
  }
};

template <class T, class Op>
T warp_reduce(T value, Op op) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value = op(value, __shfl_xor_sync(~0u, value, lanes));
  return value;
}
template <class T>
T warp_reduce_sum(T value) {
  return warp_reduce(value, SumOp());
}
template <class T>
T warp_reduce_max(T value) {
  return warp_reduce(value, MaxOp());
}
template <class T>
T warp_reduce_min(T value) {
  return warp_reduce(value, MinOp());
}

struct SyncThreadsBarrier {
  template <int name>
  static void sync() {
    __syncthreads();
  }
};
template <int threads>
struct NamedBarrier {
  template <int name>
  static void sync() {
    __sync_thread_partial(name, threads);
  }
};

// AllReduce is a butterfly over thread indices: through shared memory from distance 32 on, by
// shuffles below that.
template <class Op, int threads, int scale, int offset = 0, class Sync = SyncThreadsBarrier>
struct AllReduce {
  template <class T>
  static T run(T value, T* shared = nullptr) {
    for (int distance = threads / 2; distance >= scale; distance /= 2) {
      if (distance >= 32) {
        const int thread = int(threadIdx.x) - offset;
        Sync::template sync<1>();
        shared[thread] = value;
        Sync::template sync<2>();
        value = Op()(value, shared[thread ^ distance]);
      } else {
        value = Op()(value, __shfl_xor_sync(~0u, value, distance));
      }
    }
    return value;
  }
};

}  // namespace tl

// CUDA's memory orders have the same numbers as those of the compiler's builtins.
namespace emulation {

template <class T, class Op>
T update(T* address, Op op, int order) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = op(old);
  } while (!__atomic_compare_exchange(address, &old, &next, false, order, __ATOMIC_RELAXED));
  return old;
}

}  // namespace emulation

template <class T, class V>
T AtomicAddRet(T* address, V value, int order = __ATOMIC_RELAXED) {
  return emulation::update(address, [=](T old) { return T(old + T(value)); }, order);
}
// TileLang 0.1.15 drops the memory order of an addition whose result is not used.
template <class T, class V>
void AtomicAdd(T* address, V value, int = __ATOMIC_RELAXED) {
  AtomicAddRet(address, value, __ATOMIC_RELAXED);
}
template <class T, class V>
T AtomicMaxRet(T* address, V value, int order = __ATOMIC_RELAXED) {
  return emulation::update(address, [=](T old) { return max(old, T(value)); }, order);
}
template <class T, class V>
void AtomicMax(T* address, V value, int order = __ATOMIC_RELAXED) {
  AtomicMaxRet(address, value, order);
}
template <class T, class V>
T AtomicMinRet(T* address, V value, int order = __ATOMIC_RELAXED) {
  return emulation::update(address, [=](T old) { return min(old, T(value)); }, order);
}
template <class T, class V>
void AtomicMin(T* address, V value, int order = __ATOMIC_RELAXED) {
  AtomicMinRet(address, value, order);
}
template <class T>
T AtomicLoad(T* address, int order) {
  emulation::yield();  // Such loads stand in loops that wait.
  T value;
  __atomic_load(address, &value, order);
  return value;
}
template <class T, class V>
void AtomicStore(T* address, V value, int order) {
  T converted = T(value);
  __atomic_store(address, &converted, order);
}
