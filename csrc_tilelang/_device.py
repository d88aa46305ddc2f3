"""Small device functions that the TileLang language lacks, and the constants that kernels share.

A kernel takes the functions in with ``T.import_source(DEVICE_SOURCE)`` and calls them with
``T.call_extern``. The two bounding comment lines let the CPU emulation of the tests cut the PTX
out and put its own twins in.
"""

# what the table of routes has to know of the kernels is defined there
from ..geometry import HC_MULT as HC_MULT
from ..geometry import MIXES as MIXES
from ..geometry import MMA_COLUMNS as MMA_COLUMNS
from ..geometry import MMA_TOKENS as MMA_TOKENS
from ..geometry import PARTIAL_WIDTH as PARTIAL_WIDTH

SQUARES = MIXES  # column of a partial row that holds the sum of squares

WARP = 32
VECTOR = 8  # bf16 elements in 16 bytes
MMA_HALF = MMA_TOKENS // 2  # token rows of a fragment half: lane // 4 and lane // 4 + 8
SPLIT_TERMS = 3  # bf16 terms of an fp32 weight: 8 + 8 + 8 bits of mantissa
TILE_TERMS = VECTOR // 2 * SPLIT_TERMS  # packed pairs of a lane's 8 columns, in three terms
SUMS_STRIDE = 40  # floats of a row of sums in shared memory: 8 rows of float2 on different banks

DEVICE_SOURCE = r"""
// mhc device functions: begin
namespace mhc {

// acc += a * b, mma.sync m16n8k16 on bf16 with fp32 accumulators; fragments as in the PTX ISA.
__device__ __forceinline__ void mma_bf16(float* acc, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two fp32 as three packed bf16 pairs, high to low: x = out[0] + out[1] + out[2] to 24 bits.
__device__ __forceinline__ void split3(float lo, float hi, unsigned* out) {
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    out[term] = packed;
    lo -= __uint_as_float(packed << 16);
    hi -= __uint_as_float(packed & 0xffff0000u);
  }
}

// A hint: it reads nothing into the SM, so it may run before the previous kernel has finished.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// The same for `bytes` bytes, a multiple of 16: nothing of the SM waits for it.
__device__ __forceinline__ void prefetch_l2_bulk(const void* address, unsigned bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
}

// Global to shared memory without registers: 16 bytes, there after a wait in this thread. Not past
// L1 (.cg): with that, fused_post_pre took 1.3 us more for 128 tokens at H = 7168.
__device__ __forceinline__ void load_async16(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
               ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
}

// The same past L1.
__device__ __forceinline__ void load_stream16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
}

// What this thread has loaded since the last commit becomes a group, be it empty.
__device__ __forceinline__ void loads_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all of this thread's groups but the last so many.
template <int groups>
__device__ __forceinline__ void loads_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// Waits for all of this thread's loads, committed or not.
__device__ __forceinline__ void loads_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// `bytes` bytes, a multiple of 16, of which an inbox of this CTA is told when they have come. Call
// bulk_fence before, where the CTA has used the place. By a whole warp whose lanes all ask for the
// same, once: with an elected lane the compiler makes the addresses in uniform registers. A lane
// that asks alone goes through a loop over the lanes, 14 instructions and 79 cycles a copy.
__device__ __forceinline__ void load_bulk(void* shared, const void* global, unsigned bytes,
                                          void* inbox) {
  asm volatile("{\n"
               ".reg .pred one;\n"
               "elect.sync _|one, 0xffffffff;\n"
               "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];\n"
               "}" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(bytes), "r"(static_cast<unsigned>(__cvta_generic_to_shared(inbox)))
               : "memory");
}

// The same for 4 rows: `pitch` bytes apart in shared memory, `stride` in global memory.
__device__ __forceinline__ void load_bulk4(void* shared, unsigned pitch, const void* global,
                                           unsigned stride, unsigned bytes, void* inbox) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const char* const from = static_cast<const char*>(global);
  asm volatile("{\n"
               ".reg .pred one;\n"
               "elect.sync _|one, 0xffffffff;\n"
               "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%4], %8, [%9];\n"
               "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%1], [%5], %8, [%9];\n"
               "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%2], [%6], %8, [%9];\n"
               "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%3], [%7], %8, [%9];\n"
               "}" ::"r"(to), "r"(to + pitch), "r"(to + 2 * pitch), "r"(to + 3 * pitch),
               "l"(from), "l"(from + stride), "l"(from + 2 * stride), "l"(from + 3 * stride),
               "r"(bytes), "r"(static_cast<unsigned>(__cvta_generic_to_shared(inbox)))
               : "memory");
}

// 16 bytes to global memory. Of `*(uint4*)p = v` nvcc made four stores where p is a longer sum.
__device__ __forceinline__ void store16(void* global, const unsigned* words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// 1 / x to 1 ulp in one instruction; Sinkhorn corrects itself.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// An inbox is an mbarrier. Its first phase ends when `bytes` bytes have been sent to it. Open it in
// one thread, then pass a cluster barrier before anyone sends.
__device__ __forceinline__ void inbox_open(void* inbox, unsigned bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(inbox));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Waits until all bytes of a phase of this CTA's inbox have come and are visible. Phases have the
// parities 0, 1, 0 and so on; the next one must not end before all have seen the end of this one.
// The scope is the CTA: what messages write is shared memory. With .acquire.cluster each wait
// dropped the whole L1.
__device__ __forceinline__ void inbox_wait(void* inbox, int parity = 0) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(inbox));
  asm volatile("{\n"
               ".reg .pred full;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 full, [%0], %1;\n"
               "@!full bra again;\n"
               "}" ::"r"(address), "r"(parity)
               : "memory");
}

// The next phase ends when `bytes` bytes have been sent, those that came already among them. In one
// thread, which has waited for the phase before. After the last phase it may be left so.
__device__ __forceinline__ void inbox_again(void* inbox, unsigned bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(inbox));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
}

// A gate is an mbarrier too: a phase of it ends when threads of this CTA have passed it `count`
// times, and the next one begins. Open it in one thread, then pass a barrier.
__device__ __forceinline__ void gate_open(void* gate, unsigned count) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(gate));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// What this thread did before, or saw done by others, is visible to who waits for the phase.
__device__ __forceinline__ void gate_pass(void* gate) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(gate));
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

// Waits for the end of a phase, as inbox_wait.
__device__ __forceinline__ void gate_wait(void* gate, int parity) { inbox_wait(gate, parity); }

// slot and inbox of CTA `rank` of the cluster, given by this CTA's own addresses: *slot = value, 4
// bytes.
__device__ __forceinline__ void send(void* slot, void* inbox, int rank, float value) {
  unsigned to, box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(slot))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(box)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(inbox))), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
               ::"r"(to), "f"(value), "r"(box)
               : "memory");
}

// The same with 8 bytes.
__device__ __forceinline__ void send2(void* slot, void* inbox, int rank, float a, float b) {
  unsigned to, box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(slot))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(box)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(inbox))), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
      ::"r"(to), "f"(a), "f"(b), "r"(box)
      : "memory");
}

// The same with 16 bytes.
__device__ __forceinline__ void send4(void* slot, void* inbox, int rank, const float* values) {
  unsigned to, box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(slot))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(box)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(inbox))), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(to), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(box)
      : "memory");
}

// What this thread did to shared memory, or saw done by others, comes before its next load_bulk.
__device__ __forceinline__ void bulk_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace mhc
// mhc device functions: end
"""
