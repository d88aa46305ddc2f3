// This header is the part of CUDA C++ that generated kernels use.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "bfloat16.h"
#include "runtime.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulation::running->index)
#define blockIdx (::emulation::running->cta_index)
#define blockDim (::emulation::threads_of_cta())
#define gridDim (::emulation::ctas_of_grid())

// --- barriers

inline void __syncthreads() { emulation::wait_at_barrier(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffff) { emulation::wait_for_warp(mask); }

// These two are programmatic dependent launch. The trigger only lets the next kernel start early,
// and the next kernel waits for the end of this one before it touches memory.
inline void cudaGridDependencySynchronize() { emulation::wait_for_dependency(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// --- shuffles

namespace emulation {

// Lanes holds a value of every lane.
template <class T>
struct Lanes {
  T values[WARP];
  const T& operator[](unsigned lane) const { return values[lane]; }
};

template <class T>
Lanes<T> gather(unsigned mask, const T& value) {
  Lanes<T> lanes;
  exchange(mask, &value, sizeof(T), lanes.values);
  return lanes;
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
  const int lane = emulation::running->lane();
  return emulation::shuffle(mask, value, (lane & -width) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = emulation::running->lane(), source = lane ^ lanes;
  return emulation::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = emulation::running->lane(), source = lane + int(lanes);
  return emulation::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = emulation::running->lane(), source = lane - int(lanes);
  return emulation::shuffle(mask, value, source >= (lane & -width) ? source : lane);
}

// --- arithmetic

template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
// Of a number and a NaN these two take the number.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
