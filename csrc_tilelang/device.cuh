// mhc device functions: begin
// Each function below wraps one PTX instruction, or one pattern of a few. device.py has a Python
// function of the same name for each, which says what a kernel has to know of it.
namespace mhc {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// A fragment is laid out as the PTX ISA describes for mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float* acc, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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

__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ void prefetch_l2_bulk(const void* address, unsigned bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
}

// This copy keeps its line in L1: fused_post_pre is slower with .cg (benchmarks/NOTES.md,
// "cp.async through L1").
__device__ __forceinline__ void load_async16(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
               ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}

__device__ __forceinline__ void load_stream16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}

__device__ __forceinline__ void loads_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int groups>
__device__ __forceinline__ void loads_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

__device__ __forceinline__ void loads_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The whole warp asks for the same copy, and elect.sync picks the lane that issues the copy: so the
// compiler keeps the addresses in uniform registers. For a copy asked for by one lane alone ptxas
// makes a loop over the lanes.
__device__ __forceinline__ void load_bulk(void* shared, const void* global, unsigned bytes,
                                          void* inbox) {
  asm volatile("{\n"
               ".reg .pred one;\n"
               "elect.sync _|one, 0xffffffff;\n"
               "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];\n"
               "}" ::"r"(shared_address(shared)), "l"(global), "r"(bytes),
               "r"(shared_address(inbox))
               : "memory");
}

__device__ __forceinline__ void load_bulk4(void* shared, unsigned pitch, const void* global,
                                           unsigned stride, unsigned bytes, void* inbox) {
  const unsigned to = shared_address(shared);
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
               "r"(bytes), "r"(shared_address(inbox))
               : "memory");
}

// nvcc makes four stores of `*(uint4*)p = v` where p is a longer sum.
__device__ __forceinline__ void store16(void* global, const unsigned* words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void inbox_open(void* inbox, unsigned bytes) {
  const unsigned address = shared_address(inbox);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The scope is the CTA, because messages write shared memory alone; a wait with .acquire.cluster
// drops the whole L1.
__device__ __forceinline__ void inbox_wait(void* inbox, int parity = 0) {
  const unsigned address = shared_address(inbox);
  asm volatile("{\n"
               ".reg .pred full;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 full, [%0], %1;\n"
               "@!full bra again;\n"
               "}" ::"r"(address), "r"(parity)
               : "memory");
}

__device__ __forceinline__ void inbox_again(void* inbox, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(shared_address(inbox)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void gate_open(void* gate, unsigned count) {
  const unsigned address = shared_address(gate);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void gate_pass(void* gate) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(gate)) : "memory");
}

__device__ __forceinline__ void gate_wait(void* gate, int parity) { inbox_wait(gate, parity); }

// The address of a place of this CTA in CTA `rank` of the cluster.
__device__ __forceinline__ unsigned in_cta(const void* place, int rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(place)), "r"(rank));
  return there;
}

__device__ __forceinline__ void send(void* slot, void* inbox, int rank, float value) {
  const unsigned to = in_cta(slot, rank);
  const unsigned box = in_cta(inbox, rank);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
               ::"r"(to), "f"(value), "r"(box)
               : "memory");
}

__device__ __forceinline__ void send2(void* slot, void* inbox, int rank, float a, float b) {
  const unsigned to = in_cta(slot, rank);
  const unsigned box = in_cta(inbox, rank);
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
      ::"r"(to), "f"(a), "f"(b), "r"(box)
      : "memory");
}

__device__ __forceinline__ void send4(void* slot, void* inbox, int rank, const float* values) {
  const unsigned to = in_cta(slot, rank);
  const unsigned box = in_cta(inbox, rank);
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(to), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(box)
      : "memory");
}

__device__ __forceinline__ void bulk_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace mhc
// mhc device functions: end
