// The part of CUDA C++ that generated kernels use.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "bfloat16.h"
#include "cta.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulation::self()->index)
#define blockIdx (::emulation::self()->cta_index)
#define blockDim (::emulation::self()->cta->grid.threads)
#define gridDim (::emulation::self()->cta->grid.ctas)

// --- barriers

inline void __syncthreads() {
  emulation::Cta& cta = *emulation::self()->cta;
  cta.barriers[0].wait(cta.grid.threads.count(), "barrier", 0);
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulation::Thread& thread = *emulation::self();
  emulation::Warp& warp = thread.cta->warps[thread.warp()];
  warp.lock.lock();
  emulation::Barrier& barrier = warp.syncs[mask];
  warp.lock.unlock();
  barrier.wait(std::popcount(mask), "__syncwarp of warp", thread.warp());
}

// Programmatic dependent launch. The trigger only lets the next kernel start early, and that kernel
// waits for the end of this one before it touches memory.
inline void cudaGridDependencySynchronize() { emulation::dependency.wait(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// --- shuffles

namespace emulation {

// The values of all lanes of `mask`, which must all come here.
template <class T>
std::array<T, WARP> gather(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= Exchange::SLOT && std::is_trivially_copyable_v<T>);
  Unobserved exchange_of_registers;
  Thread& thread = *self();
  if (!(mask >> thread.lane() & 1)) fail("lane %u is not in the mask %#x", thread.lane(), mask);
  Warp& warp = thread.cta->warps[thread.warp()];
  warp.lock.lock();
  Exchange& exchange = warp.exchanges[mask];
  warp.lock.unlock();
  auto& slots = exchange.slots[exchange.round[thread.lane()]++ % 2];
  std::memcpy(slots[thread.lane()], &value, sizeof(T));
  exchange.all.wait(std::popcount(mask), "exchange of warp", thread.warp());
  std::array<T, WARP> values;
  for (unsigned lane = 0; lane < WARP; ++lane) std::memcpy(&values[lane], slots[lane], sizeof(T));
  return values;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  if (!(mask >> source & 1)) fail("shuffle from lane %u, which is not in the mask %#x", source, mask);
  return gather(mask, value)[source];
}

}  // namespace emulation

// A source outside of the lane's own segment of `width` lanes gives the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulation::self()->lane();
  return emulation::shuffle(mask, value, (lane & -width) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = emulation::self()->lane(), source = lane ^ lanes;
  return emulation::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = emulation::self()->lane(), source = lane + int(lanes);
  return emulation::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = emulation::self()->lane(), source = lane - int(lanes);
  return emulation::shuffle(mask, value, source >= (lane & -width) ? source : lane);
}

// --- arithmetic

using std::max;
using std::min;
// CUDA's are those of IEEE: of a number and a NaN they take the number.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
