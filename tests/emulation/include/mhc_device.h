// This header has twins of the device functions in csrc_tilelang/device.cuh, which are PTX. A test
// checks that names and arguments are the same.
#pragma once

#include <array>
#include <cstdint>

#include "cuda.h"

namespace emulation {

// The function returns whether this lane does what its whole warp asks for; all lanes must ask for
// the same. The last lane does it here, and nobody may rely on which lane a GPU elects.
template <class... Values>
bool elected(const char* operation, Values... values) {
  const std::array<uint64_t, sizeof...(Values)> request = {uint64_t(values)...};
  const auto lanes = gather(~0u, request);
  if (request != lanes[0]) fail("%s: the lanes of a warp do not ask for the same", operation);
  return running->lane() == WARP - 1;
}

}  // namespace emulation

namespace mhc {

// This is mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, with fragments as in the PTX ISA.
// With g = lane / 4 and t = lane % 4, register r of A holds row g + 8 * (r % 2), columns 2 t + 8 *
// (r / 2) and the next; register r of B holds rows 2 t + 8 r and the next, column g; acc[i] is row
// g + 8 * (i / 2), column 2 t + i % 2. The products are exact, and are added in fp32 in the order
// of k.
__device__ __forceinline__ void mma_bf16(float* acc, const unsigned* a, unsigned b0, unsigned b1) {
  struct Operands {
    unsigned a[4], b[2];
  };
  const auto lanes = emulation::gather(~0u, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = emulation::running->lane();
  const auto element = [](unsigned pair, unsigned k) {
    return __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned t = k % 8 / 2;
      acc[i] += element(lanes[row % 8 * 4 + t].a[row / 8 + k / 8 * 2], k) *
                element(lanes[column * 4 + t].b[k / 8], k);
    }
  }
}

__device__ __forceinline__ void split3(float lo, float hi, unsigned* out) {
  for (int term = 0; term < 3; ++term) {
    const bfloat16_t low(lo), high(hi);
    out[term] = low.storage | unsigned(high.storage) << 16;
    lo -= float(low);
    hi -= float(high);
  }
}

__device__ __forceinline__ void prefetch_l2(const void* address) {}

__device__ __forceinline__ void prefetch_l2_bulk(const void* address, unsigned bytes) {}

// The target of a load is poison until a wait that covers the group of the load.
__device__ __forceinline__ void load_async16(void* shared, const void* global) {
  emulation::load("load_async16", shared, global);
}
__device__ __forceinline__ void load_stream16(void* shared, const void* global) {
  emulation::load("load_stream16", shared, global);
}
__device__ __forceinline__ void loads_commit() { emulation::commit_loads(); }
template <int groups>
__device__ __forceinline__ void loads_wait_but() {
  emulation::wait_for_loads(groups);
}
__device__ __forceinline__ void loads_wait() {
  emulation::commit_loads();
  emulation::wait_for_loads(0);
}

__device__ __forceinline__ void store16(void* global, const unsigned* words) {
  *static_cast<uint4*>(global) = make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float rcp(float x) { return 1.0f / x; }

// A slot is poisoned when something is sent to it, and gets its value when the inbox's phase ends.
__device__ __forceinline__ void inbox_open(void* inbox, unsigned bytes) {
  emulation::open_inbox(inbox, bytes);
}

__device__ __forceinline__ void inbox_wait(void* inbox, int parity = 0) {
  emulation::wait_for_inbox(inbox, parity);
}

__device__ __forceinline__ void inbox_again(void* inbox, unsigned bytes) {
  emulation::arm_inbox(inbox, bytes);
}

__device__ __forceinline__ void gate_open(void* gate, unsigned count) {
  emulation::open_gate(gate, count);
}

__device__ __forceinline__ void gate_pass(void* gate) { emulation::pass_gate(gate); }

__device__ __forceinline__ void gate_wait(void* gate, int parity) {
  emulation::wait_for_gate(gate, parity);
}

__device__ __forceinline__ void send(void* slot, void* inbox, int rank, float value) {
  emulation::send("send", slot, inbox, rank, &value, sizeof(value));
}

__device__ __forceinline__ void send2(void* slot, void* inbox, int rank, float a, float b) {
  const float values[2] = {a, b};
  emulation::send("send2", slot, inbox, rank, values, sizeof(values));
}

__device__ __forceinline__ void send4(void* slot, void* inbox, int rank, const float* values) {
  emulation::send("send4", slot, inbox, rank, values, 4 * sizeof(*values));
}

__device__ __forceinline__ void bulk_fence() { emulation::fence_bulk(); }

__device__ __forceinline__ void load_bulk(void* shared, const void* global, unsigned bytes,
                                          void* inbox) {
  if (emulation::elected("load_bulk", reinterpret_cast<uintptr_t>(shared),
                         reinterpret_cast<uintptr_t>(global), bytes,
                         reinterpret_cast<uintptr_t>(inbox)))
    emulation::load_bulk(shared, global, bytes, inbox);
}

__device__ __forceinline__ void load_bulk4(void* shared, unsigned pitch, const void* global,
                                           unsigned stride, unsigned bytes, void* inbox) {
  for (unsigned row = 0; row < 4; ++row)
    load_bulk(static_cast<char*>(shared) + row * pitch,
              static_cast<const char*>(global) + row * stride, bytes, inbox);
}

}  // namespace mhc
