// The tests of the emulation run this one kernel, so that it is built once; `sample` says what it does.
// Parameters and declarations of shared memory have the form of TileLang's output, for the translation.

enum Sample {
  // The emulation refuses these.
  WRITE_BEHIND,
  WRITE_IN_FRONT,
  READ_BEHIND,
  WRITE_CONST,
  SHARED_BEHIND,
  SHARED_IN_FRONT,
  STATIC_SHARED_IN_FRONT,
  LOCAL_BEHIND,
  MISALIGNED,
  TOUCH_BEFORE_DEPENDENCY,
  MISSED_BARRIER,
  UNEQUAL_BARRIER,
  SHUFFLE_WITHOUT_LANE,
  SHUFFLE_FROM_OUTSIDE,
  ENDLESS_WAIT,
  LOAD_NOT_AWAITED,
  LOAD_TWICE,
  LOAD_OUTSIDE,
  LOAD_MISALIGNED,
  LOAD_SOURCE_WRITTEN,
  REGISTERS_ODD,
  GATE_TWICE,
  GATE_OF_NOBODY,
  GATE_CLOSED,
  GATE_MISSED,
  GATE_IS_INBOX,
  GATE_OVERWRITTEN,
  // The emulation refuses these of a cluster.
  CLUSTER_ARRIVE_TWICE,
  CLUSTER_WAIT_TWICE,
  CLUSTER_BARRIER_MISSED,
  OPEN_TWICE,
  OPEN_OUTSIDE,
  WAIT_FOR_CLOSED,
  SEND_TO_CLOSED,
  SEND_WITHOUT_BARRIER,
  SEND_TOO_MUCH,
  SEND_TOO_LITTLE,
  SEND_TO_NOBODY,
  SEND_TO_ENDED,
  SEND_TWICE,
  SEND_SLOT_OUTSIDE,
  SEND_INBOX_OUTSIDE,
  SEND4_MISALIGNED,
  NOBODY_WAITS,
  INBOX_OVERWRITTEN,
  AGAIN_TOO_EARLY,
  AGAIN_TWICE,
  AGAIN_WITHOUT_WAIT,
  AGAIN_TOO_LITTLE,
  AGAIN_MISSED,
  AGAIN_SEND_TOO_MUCH,
  AGAIN_SEND_TWICE,
  AGAIN_NOBODY_WAITS,
  AGAIN_INCOMPLETE,
  BULK_ODD,
  BULK_TOO_LARGE,
  BULK_MISALIGNED,
  BULK_SOURCE_MISALIGNED,
  BULK_NOT_FENCED,
  BULK_FENCED_TOO_EARLY,
  // These show poison.
  NOTHING,
  READ_IN_FRONT,
  READ_SHARED,
  READ_LOCAL,
  LOADS,
  LOADS_BUT_TWO,
  LOADS_NONE,
  LOADS_UNCOMMITTED,
  // These wait for the previous kernel, or do not.
  AFTER_DEPENDENCY,
  ONE_THREAD_WAITS,
  CLUSTER_WAITS,
  CLUSTER_TOUCHES_BEFORE_DEPENDENCY,
  // These compute.
  SHUFFLE_XOR,
  SHUFFLE_XOR_OF_8,
  SHUFFLE,
  SHUFFLE_OF_4,
  SHUFFLE_DOWN_OF_16,
  SHUFFLE_UP_OF_16,
  REDUCE,
  MMA,
  SPLIT3,
  // These run in a cluster.
  RANKS,
  CLUSTER_SIZE,
  SEND,
  SEND2,
  SEND4,
  SEND_LATE,
  REGISTERS,
  // These order memory, or do not, in one CTA.
  BY_SYNCTHREADS,
  BY_SYNCWARP,
  BY_NAMED_BARRIER,
  BY_ARRIVE,
  BY_GATE,
  BY_SECOND_PHASE,
  BY_FORMER_PHASE,
  BY_LATE_GATE,
  BY_LOAD,
  BY_LATE_LOAD,
  BY_SHUFFLE,
  BY_NOTHING,
  // These order memory, or do not, between two CTAs.
  SAME_ELEMENTS,
  OWN_ELEMENTS,
  RELEASE,
  RELAXED,
  RELEASE_WITHOUT_RESULT,
  // These order memory, or do not, between two CTAs of a cluster.
  CLUSTER_BARRIER,
  CLUSTER_BARRIER_APART,
  CLUSTER_BARRIER_RELAXED,
  INBOX,
  INBOX_OPENED_RELAXED,
  INBOX_WITHOUT_WAIT,
  INBOX_OTHER,
  INBOX_OTHER_MEMORY,
  INBOX_AFTER_READ,
  INBOX_OPENED_IN_TIME,
  INBOX_OPENED_UNORDERED,
  SLOT_TWICE,
  SLOT_OF_TWO,
  SLOT_AGAIN,
  PHASES,
  PHASES_EARLY,
  PHASES_TOLD,
  PHASES_UNREAD,
  PHASES_WITHOUT_WAIT,
  PHASES_UNTOLD,
  LOAD_BEHIND,
  LOAD_UNREAD,
  LOAD_BULK,
  LOAD_BULK4,
  LOAD_BULK_APART,
  LOAD_BULK_AGAIN,
};

extern "C" __global__ void __launch_bounds__(64, 1) sample_kernel(float* out, const float* in, int* counter, int sample) {
  extern __shared__ __align__(1024) float shared[];
  __shared__ __align__(16) float sums[64];
  __shared__ __align__(16) uint64_t inboxes[4];
  float local[4];
  float acc[4];
  uint terms[3];
  const int t = ((int)threadIdx.x);
  const uint full = (uint)4294967295;
  const int rank = tl::block_rank_in_cluster();
  const int peer = 1 - rank;
  const int cta = ((int)blockIdx.x);
  switch (sample) {
    case WRITE_BEHIND: out[t + 1] = in[t]; break;
    case WRITE_IN_FRONT: out[t - 1] = in[t]; break;
    case READ_BEHIND: out[t] = in[t + 1]; break;
    case WRITE_CONST: const_cast<float*>(in)[t] = 0.0f; break;
    case SHARED_BEHIND: shared[t + 1] = in[t]; break;
    case SHARED_IN_FRONT: shared[t - 1] = in[t]; break;
    case STATIC_SHARED_IN_FRONT: (&sums[0])[t - 1] = in[t]; break;
    case LOCAL_BEHIND: out[t] = local[t]; break;
    case MISALIGNED: *(float4*)(out + 1) = *(float4*)(in); break;
    case TOUCH_BEFORE_DEPENDENCY: {
      const float value = in[t];
      cudaGridDependencySynchronize();
      out[t] = value;
      break;
    }
    case MISSED_BARRIER:
      if (t != 5) __syncthreads();
      break;
    case UNEQUAL_BARRIER: tl::__sync_thread_partial(1, t < 32 ? 64 : 32); break;
    case SHUFFLE_WITHOUT_LANE:
      if (t != 5) out[t] = __shfl_sync(full, in[t], 0, 32);
      break;
    case SHUFFLE_FROM_OUTSIDE:
      if (t % 32 != 0) out[t] = __shfl_sync(full - 1, in[t], 0, 32);
      break;
    case ENDLESS_WAIT:
      while (AtomicLoad(&counter[0], 2) == 0) {
      }
      break;
    case LOAD_NOT_AWAITED:
      if (t == 0) mhc::load_async16((&(shared[0])), (&(in[0])));
      break;
    case LOAD_TWICE:
      if (t == 0) mhc::load_async16((&(shared[0])), (&(in[0])));
      if (t == 0) mhc::load_stream16((&(shared[0])), (&(in[4])));
      break;
    case LOAD_OUTSIDE: mhc::load_async16((&(out[0])), (&(in[0]))); break;
    case LOAD_MISALIGNED: mhc::load_stream16((&(shared[2])), (&(in[0]))); break;
    case LOAD_SOURCE_WRITTEN:
      if (t == 0) {
        mhc::load_async16((&(shared[0])), (&(out[0])));
        out[3] = 1.0f;
        mhc::loads_wait();
      }
      break;
    case REGISTERS_ODD: tl::warpgroup_reg_alloc<100>(); break;
    case GATE_TWICE:
      if (t < 2) mhc::gate_open((&(inboxes[0])), 1);
      break;
    case GATE_OF_NOBODY: mhc::gate_open((&(inboxes[t % 4])), 0); break;
    case GATE_CLOSED: mhc::gate_pass((&(inboxes[1]))); break;
    case GATE_MISSED:
    case GATE_OVERWRITTEN:
      if (t == 0) mhc::gate_open((&(inboxes[0])), 64);
      __syncthreads();
      if (sample == GATE_OVERWRITTEN && t == 0) inboxes[0] = 0;
      if (t != 5) mhc::gate_pass((&(inboxes[0])));
      mhc::gate_wait((&(inboxes[0])), 0);
      break;
    case GATE_IS_INBOX:
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 4);
      __syncthreads();
      mhc::gate_pass((&(inboxes[0])));
      break;

    case NOTHING: break;
    case READ_IN_FRONT: out[t] = in[t - 1]; break;
    case READ_SHARED: out[t] = shared[t] * sums[t]; break;
    case READ_LOCAL: out[t] = local[t % 4]; break;
    case LOADS:
    case LOADS_BUT_TWO:
    case LOADS_NONE:
    case LOADS_UNCOMMITTED:
      // There are three groups, the last of which is committed or not.
      if (t < 4) {
        for (int i = 0; i < 3; ++i) {
          if (i % 2 == 0) mhc::load_async16((&(shared[i * 16 + t * 4])), (&(in[i * 16 + t * 4])));
          if (i % 2 == 1) mhc::load_stream16((&(shared[i * 16 + t * 4])), (&(in[i * 16 + t * 4])));
          if (i < 2 || sample == LOADS_BUT_TWO) mhc::loads_commit();
        }
        if (sample == LOADS) mhc::loads_wait();
        if (sample == LOADS_BUT_TWO) mhc::loads_wait_but<2>();
        if (sample == LOADS_UNCOMMITTED) mhc::loads_wait_but<0>();
        for (int i = 0; i < 12; ++i) out[i / 4 * 16 + t * 4 + i % 4] = shared[i / 4 * 16 + t * 4 + i % 4];
        mhc::loads_wait();
      }
      break;
    case REGISTERS:
      if (t < 32) tl::warpgroup_reg_alloc<232>();
      if (t >= 32) tl::warpgroup_reg_dealloc<24>();
      break;

    case AFTER_DEPENDENCY:
      cudaGridDependencySynchronize();
      out[t] = in[t];
      break;
    case ONE_THREAD_WAITS:
      if (t == 0) cudaGridDependencySynchronize();
      __syncthreads();
      out[t] = in[t];
      break;

    case SHUFFLE_XOR: out[t] = __shfl_xor_sync(full, in[t], 5, 32); break;
    case SHUFFLE_XOR_OF_8: out[t] = __shfl_xor_sync(full, in[t], 9, 8); break;
    case SHUFFLE: out[t] = __shfl_sync(full, in[t], 35, 32); break;
    case SHUFFLE_OF_4: out[t] = __shfl_sync(full, in[t], 5, 4); break;
    case SHUFFLE_DOWN_OF_16: out[t] = __shfl_down_sync(full, in[t], 3, 16); break;
    case SHUFFLE_UP_OF_16: out[t] = __shfl_up_sync(full, in[t], 3, 16); break;
    case REDUCE: {
      const float total = tl::AllReduce<tl::SumOp, 64, 1, 0, tl::NamedBarrier<64>>::run(in[t], (&(sums[0])));
      out[t] = total + 100.0f * tl::warp_reduce_max(in[t]) - tl::warp_reduce_min(in[t]);
      break;
    }
    case MMA:  // Each lane has 6 words of operands in `in` and leaves 4 results.
      if (t < 32) {
        const uint* word = (const uint*)in + t * 6;
        for (int i = 0; i < 4; ++i) acc[i] = float(i);
        mhc::mma_bf16(acc, word, word[4], word[5]);
        for (int i = 0; i < 4; ++i) out[t * 4 + i] = acc[i];
      }
      break;
    case SPLIT3: {  // The parts of in[t] and of -in[t] are added up again, smallest first.
      mhc::split3(in[t], -in[t], terms);
      float low = 0.0f, high = 0.0f;
      for (int i = 2; i >= 0; --i) {
        low += __uint_as_float(terms[i] << 16);
        high += __uint_as_float(terms[i] & 0xffff0000u);
      }
      out[t] = low == -high ? low : 0.0f;
      break;
    }

    case BY_SYNCTHREADS:
    case BY_SYNCWARP:
    case BY_NAMED_BARRIER:
    case BY_ARRIVE:
    case BY_GATE:
    case BY_SECOND_PHASE:
    case BY_FORMER_PHASE:
    case BY_LATE_GATE:
    case BY_LOAD:
    case BY_LATE_LOAD:
    case BY_SHUFFLE:
    case BY_NOTHING:
      if (t == 0) mhc::gate_open((&(inboxes[0])), 64);
      __syncthreads();
      if (sample == BY_SECOND_PHASE || sample == BY_FORMER_PHASE || sample == BY_LATE_GATE) mhc::gate_pass((&(inboxes[0])));
      if (sample == BY_SECOND_PHASE || sample == BY_FORMER_PHASE) mhc::gate_wait((&(inboxes[0])), 0);
      // The even lanes write for the odd ones, or a lane in four loads for four.
      if (sample == BY_LOAD || sample == BY_LATE_LOAD) {
        if (t % 4 == 0) mhc::load_async16((&(shared[t])), (&(in[t])));
        if (sample == BY_LOAD) mhc::loads_wait();
        __syncthreads();
        if (sample == BY_LATE_LOAD) mhc::loads_wait();
      } else if (t % 2 == 0) {
        shared[t] = in[t];
      }
      if (sample == BY_GATE || sample == BY_SECOND_PHASE) mhc::gate_pass((&(inboxes[0])));
      if (sample == BY_GATE || sample == BY_LATE_GATE) mhc::gate_wait((&(inboxes[0])), 0);
      if (sample == BY_SECOND_PHASE) mhc::gate_wait((&(inboxes[0])), 1);
      if (sample == BY_SYNCTHREADS) __syncthreads();
      if (sample == BY_SYNCWARP) __syncwarp();
      if (sample == BY_NAMED_BARRIER) tl::__sync_thread_partial(3, 64);
      if (sample == BY_ARRIVE) {
        if (t % 2 == 0) tl::__named_barrier_arrive(4, 64);
        if (t % 2 == 1) tl::__sync_thread_partial(4, 64);
      }
      if (sample == BY_SHUFFLE) out[t] = __shfl_xor_sync(full, in[t], 1, 32);
      if (t % 2 == 1) out[t] = shared[t - 1];
      break;

    case SAME_ELEMENTS: out[t] = in[t]; break;
    case OWN_ELEMENTS:
      if (t < 32) out[((int)blockIdx.x) * 32 + t] = in[t];
      break;
    case RELEASE:
    case RELAXED:
    case RELEASE_WITHOUT_RESULT:
      // CTA 0 writes and raises the counter, and CTA 1 reads.
      if (t == 0 && ((int)blockIdx.x) == 0) {
        out[0] = in[7];
        if (sample == RELEASE) AtomicAddRet((&(counter[0])), 1, 3);
        if (sample == RELAXED) AtomicAddRet((&(counter[0])), 1, 0);
        if (sample == RELEASE_WITHOUT_RESULT) AtomicAdd((&(counter[0])), 1, 3);
      }
      if (t == 0 && ((int)blockIdx.x) == 1) {
        while (AtomicLoad((&(counter[0])), 2) == 0) {
        }
        out[1] = out[0];
      }
      break;

    case CLUSTER_ARRIVE_TWICE:
      tl::cluster_arrive();
      tl::cluster_arrive();
      break;
    case CLUSTER_WAIT_TWICE:
      tl::cluster_sync();
      tl::cluster_wait();
      break;
    case CLUSTER_BARRIER_MISSED:
      if (rank == 0 || t != 5) tl::cluster_sync();
      break;
    case OPEN_TWICE:
      if (t < 2) mhc::inbox_open((&(inboxes[0])), 4);
      break;
    case OPEN_OUTSIDE: mhc::inbox_open((&(out[0])), 4); break;
    case WAIT_FOR_CLOSED: mhc::inbox_wait((&(inboxes[1]))); break;
    case SEND_TO_CLOSED:
      if (t == 0 && rank == 0) mhc::inbox_open((&(inboxes[0])), 4);
      tl::cluster_sync();
      if (t == 0) mhc::send((&(shared[0])), (&(inboxes[0])), peer, 1.0f);
      break;
    case SEND_WITHOUT_BARRIER:
      tl::cluster_sync();
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 4);
      __syncthreads();
      if (t == 1) mhc::send((&(shared[0])), (&(inboxes[0])), rank, 1.0f);
      break;
    case SEND_TOO_MUCH:
    case SEND_TOO_LITTLE:
    case SEND_TO_NOBODY:
    case SEND_TWICE:
    case SEND_SLOT_OUTSIDE:
    case SEND_INBOX_OUTSIDE:
    case SEND4_MISALIGNED:
    case NOBODY_WAITS:
    case INBOX_OVERWRITTEN: {
      const int bytes = sample == SEND_TOO_MUCH ? 6 : sample == NOBODY_WAITS || sample == INBOX_OVERWRITTEN ? 4 : 16;
      if (t == 0) mhc::inbox_open((&(inboxes[1])), bytes);
      tl::cluster_sync();
      if (sample == INBOX_OVERWRITTEN && t == 0) inboxes[1] = 0;
      tl::cluster_sync();
      if (t == 0) {
        for (int i = 0; i < 4; ++i) acc[i] = 1.0f;
        const int to = sample == SEND_TO_NOBODY ? 2 : peer;
        float* slot = sample == SEND_SLOT_OUTSIDE ? local : shared;
        void* inbox = sample == SEND_INBOX_OUTSIDE ? (void*)(&(counter[0])) : (void*)(&(inboxes[1]));
        if (sample == SEND4_MISALIGNED) mhc::send4((&(slot[2])), inbox, to, acc);
        if (sample != SEND4_MISALIGNED) mhc::send((&(slot[0])), inbox, to, 1.0f);
        if (sample != NOBODY_WAITS) mhc::send((&(slot[sample == SEND_TWICE ? 0 : 1])), inbox, to, 2.0f);
      }
      if (sample == SEND_TOO_LITTLE) mhc::inbox_wait((&(inboxes[1])));
      if (sample == NOBODY_WAITS) tl::cluster_sync();
      break;
    }
    case AGAIN_TOO_EARLY:
    case AGAIN_TWICE:
    case AGAIN_WITHOUT_WAIT:
    case AGAIN_TOO_LITTLE:
    case AGAIN_MISSED:
    case AGAIN_SEND_TOO_MUCH:
    case AGAIN_SEND_TWICE:
    case AGAIN_NOBODY_WAITS:
    case AGAIN_INCOMPLETE: {
      // A phase of one number comes first, then one of `bytes`.
      const int bytes = sample == AGAIN_SEND_TOO_MUCH ? 6 : sample == AGAIN_SEND_TWICE || sample == AGAIN_INCOMPLETE ? 8 : 4;
      const int first = sample == AGAIN_WITHOUT_WAIT ? 32 : 0;
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 4);
      tl::cluster_sync();
      if (t == 0 && sample == AGAIN_TOO_EARLY) mhc::inbox_again((&(inboxes[0])), 4);
      if (t == 0) mhc::send((&(shared[0])), (&(inboxes[0])), peer, 1.0f);
      if (t == 0) mhc::inbox_wait((&(inboxes[0])));
      tl::cluster_sync();
      const bool again = t == first && sample != AGAIN_TOO_LITTLE && sample != AGAIN_MISSED;
      if (again) mhc::inbox_again((&(inboxes[0])), bytes);
      if (again && sample == AGAIN_TWICE) mhc::inbox_again((&(inboxes[0])), bytes);
      tl::cluster_sync();
      if (t == 0) mhc::send((&(shared[0])), (&(inboxes[0])), peer, 2.0f);
      if (t == 0 && sample == AGAIN_SEND_TWICE) mhc::send((&(shared[0])), (&(inboxes[0])), peer, 3.0f);
      if (t == 0 && (sample == AGAIN_SEND_TOO_MUCH || sample == AGAIN_TOO_LITTLE)) mhc::send((&(shared[1])), (&(inboxes[0])), peer, 3.0f);
      tl::cluster_sync();
      if (t == 0 && sample == AGAIN_TOO_LITTLE) mhc::inbox_again((&(inboxes[0])), 4);
      if (sample == AGAIN_MISSED) mhc::inbox_wait((&(inboxes[0])), 1);
      break;
    }
    case BULK_ODD:
    case BULK_TOO_LARGE:
    case BULK_MISALIGNED:
    case BULK_SOURCE_MISALIGNED:
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 16);
      tl::cluster_sync();
      if (t < 32) {
        const int bytes = sample == BULK_ODD ? 20 : sample == BULK_TOO_LARGE ? 1040 : 16;
        mhc::load_bulk((&(shared[sample == BULK_MISALIGNED ? 2 : 0])), (&(in[sample == BULK_SOURCE_MISALIGNED ? 2 : 0])), bytes, (&(inboxes[0])));
      }
      mhc::inbox_wait((&(inboxes[0])));
      break;
    case BULK_NOT_FENCED:
    case BULK_FENCED_TOO_EARLY:
    case LOAD_BULK_AGAIN:
      // A warp loads twice into the same place, and has read the first load when it asks for the second.
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 64);
      tl::cluster_sync();
      if (t < 32) {
        for (int i = 0; i < 2; ++i) {
          __syncwarp();
          if (i == 1 && sample == LOAD_BULK_AGAIN) mhc::bulk_fence();
          mhc::load_bulk((&(shared[0])), (&(in[i * 32 + rank * 16])), 64, (&(inboxes[0])));
          if (i == 0 && sample == BULK_FENCED_TOO_EARLY) mhc::bulk_fence();
          mhc::inbox_wait((&(inboxes[0])), i);
          if (t == 0 && i == 0) mhc::inbox_again((&(inboxes[0])), 64);
          if (t < 16) out[i * 32 + rank * 16 + t] = shared[t];
        }
      }
      break;
    case SEND_TO_ENDED:
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 8);
      tl::cluster_sync();
      if (rank == 0) {
        for (int i = 0; i < 9; ++i) __syncthreads();
        if (t == 0) mhc::send((&(shared[0])), (&(inboxes[0])), peer, 1.0f);
      }
      break;

    case CLUSTER_WAITS:
      tl::cluster_arrive();
      if (t == 0 && rank == 1) cudaGridDependencySynchronize();
      tl::cluster_wait();
      tl::cluster_sync();
      if (rank == 1) out[t] = in[t];
      break;
    case CLUSTER_TOUCHES_BEFORE_DEPENDENCY:
      if (rank == 0) cudaGridDependencySynchronize();
      if (rank == 1) out[t] = in[t];
      break;

    case RANKS:
      if (t < 16) out[cta * 16 + t] = float(rank);
      break;
    case CLUSTER_SIZE:
      AtomicAdd((&(counter[0])), 1);
      for (int i = 0; i < 9; ++i) tl::cluster_sync();
      if (rank == 0) out[t] = float(counter[0]);
      break;
    case SEND:
    case SEND_LATE:
      // Both CTAs send to both; CTA r fills half r of the slots, two of them late or not.
      if (t == 0) mhc::inbox_open((&(inboxes[2])), 256);
      shared[t] = 0.0f;
      tl::cluster_sync();
      if (t < 32) mhc::send((&(shared[rank * 32 + t])), (&(inboxes[2])), 0, in[rank * 32 + t]);
      if (t < (sample == SEND ? 32 : 31)) mhc::send((&(shared[rank * 32 + t])), (&(inboxes[2])), 1, in[rank * 32 + t]);
      tl::cluster_sync();
      if (sample == SEND) mhc::inbox_wait((&(inboxes[2])));
      if (rank == 1) out[t] = shared[t];
      tl::cluster_sync();
      if (sample == SEND_LATE && t == 31) mhc::send((&(shared[rank * 32 + t])), (&(inboxes[2])), 1, in[rank * 32 + t]);
      mhc::inbox_wait((&(inboxes[2])));
      break;
    case SEND2:
    case SEND4:
      if (t == 0) mhc::inbox_open((&(inboxes[3])), 256);
      shared[t] = in[t] + float(rank) * 100.0f;
      tl::cluster_sync();
      if (sample == SEND2 && t < 32) mhc::send2((&(sums[t * 2])), (&(inboxes[3])), peer, shared[t * 2], shared[t * 2 + 1]);
      if (sample == SEND4 && t < 16) {
        for (int i = 0; i < 4; ++i) acc[i] = in[t * 4 + i] + float(rank) * 100.0f;
        mhc::send4((&(sums[t * 4])), (&(inboxes[3])), peer, acc);
      }
      mhc::inbox_wait((&(inboxes[3])));
      if (rank == 0) out[t] = sums[t];
      break;

    case CLUSTER_BARRIER:
    case CLUSTER_BARRIER_APART:
    case CLUSTER_BARRIER_RELAXED:
      // CTA 0 writes global memory, and CTA 1 reads it.
      if (rank == 0 && t == 0) out[cta] = in[7];
      if (sample == CLUSTER_BARRIER) tl::cluster_sync();
      if (sample == CLUSTER_BARRIER_APART) tl::cluster_arrive();
      if (sample == CLUSTER_BARRIER_RELAXED) tl::cluster_arrive_relaxed();
      if (sample != CLUSTER_BARRIER) tl::cluster_wait();
      if (rank == 1 && t == 40) out[cta] = out[cta - 1];
      break;
    case INBOX:
    case INBOX_OPENED_RELAXED:
    case INBOX_WITHOUT_WAIT:
    case INBOX_OTHER:
    case INBOX_OTHER_MEMORY:
    case INBOX_AFTER_READ:
      // Each CTA sends a number to two inboxes of the other one.
      if (t < 2) mhc::inbox_open((&(inboxes[t])), 4);
      if (sample == INBOX_OPENED_RELAXED) {
        tl::cluster_arrive_relaxed();
        tl::cluster_wait();
      }
      if (sample != INBOX_OPENED_RELAXED) tl::cluster_sync();
      if (sample == INBOX_AFTER_READ && t == 33) out[32 + cta] = shared[0];
      if (t == 0) {
        if (sample == INBOX_OTHER_MEMORY) out[32 + cta] = in[1];
        mhc::send((&(shared[0])), (&(inboxes[0])), peer, in[7]);
        mhc::send((&(shared[1])), (&(inboxes[1])), peer, in[8]);
      }
      if (t == 32) {
        if (sample != INBOX_WITHOUT_WAIT && sample != INBOX_OTHER) mhc::inbox_wait((&(inboxes[0])));
        if (sample == INBOX_OTHER) mhc::inbox_wait((&(inboxes[1])));
        if (sample == INBOX_OTHER_MEMORY) out[cta] = out[32 + (cta ^ 1)];
        if (sample != INBOX_OTHER_MEMORY) out[cta] = shared[0];
      }
      if (t == 1) {
        mhc::inbox_wait((&(inboxes[0])));
        mhc::inbox_wait((&(inboxes[1])));
      }
      break;
    case INBOX_OPENED_IN_TIME:
    case INBOX_OPENED_UNORDERED:
      // One warp opens an inbox of no bytes for another.
      if (t == 0) {
        mhc::inbox_open((&(inboxes[0])), 0);
        AtomicAddRet((&(counter[0])), 1, 0);
      }
      if (sample == INBOX_OPENED_IN_TIME) __syncthreads();
      if (t == 32) {
        while (AtomicLoad((&(counter[0])), 0) < 2) {
        }
        mhc::inbox_wait((&(inboxes[0])));
      }
      break;
    case SLOT_TWICE:
    case SLOT_OF_TWO:
    case SLOT_AGAIN:
      // A slot is sent to again: by the same CTA, by both, after all have read it.
      if (t < 2) mhc::inbox_open((&(inboxes[t])), sample == SLOT_AGAIN ? 4 : 8);
      tl::cluster_sync();
      if (t == 0 && sample != SLOT_OF_TWO) mhc::send((&(shared[0])), (&(inboxes[0])), peer, in[7]);
      if (t == 0 && sample == SLOT_TWICE) mhc::send((&(shared[0])), (&(inboxes[0])), peer, in[8]);
      if (t == 0 && sample == SLOT_OF_TWO) mhc::send((&(shared[0])), (&(inboxes[0])), 0, in[8]);
      mhc::inbox_wait((&(inboxes[0])));
      if (t == 2) out[cta] = shared[0];
      tl::cluster_sync();
      if (t == 33) mhc::send((&(shared[0])), (&(inboxes[1])), peer, in[8]);
      mhc::inbox_wait((&(inboxes[1])));
      if (t == 3) out[32 + cta] = shared[0];
      break;
    case PHASES:
    case PHASES_EARLY:
    case PHASES_TOLD:
    case PHASES_UNREAD:
    case PHASES_WITHOUT_WAIT:
    case PHASES_UNTOLD: {
      // There are five rounds without a barrier: warp 0 sends to the peer's warp 1, which sends back that
      // it has read. Inbox 0 gets the numbers; inbox 1 hears that the numbers have been read, and inbox
      // 2 that they are under way, which makes room for messages that come before inbox_again.
      float total = 0.0f;
      if (t < 3) mhc::inbox_open((&(inboxes[t])), t == 0 ? 128 : 4);
      tl::cluster_sync();
      for (int i = 0; i < 5; ++i) {
        if (t < 32) {
          const bool one_waits = sample == PHASES_TOLD || sample == PHASES_UNTOLD;
          if (i > 0 && (t == 0 || !one_waits)) mhc::inbox_wait((&(inboxes[1])), (i - 1) % 2);
          if (i > 0 && t == 0) mhc::inbox_again((&(inboxes[1])), 4);
          if (sample == PHASES_TOLD) __syncwarp();
          mhc::send((&(shared[t])), (&(inboxes[0])), peer, in[t] + float(i));
          __syncwarp();
          if (t == 0) mhc::send((&(sums[8])), (&(inboxes[2])), peer, 1.0f);
        } else {
          if (i > 0 && t == 32 && sample == PHASES_EARLY) {
            mhc::inbox_wait((&(inboxes[2])), i % 2);
            mhc::inbox_again((&(inboxes[0])), 128);
          }
          if (sample != PHASES_WITHOUT_WAIT || t != 40) mhc::inbox_wait((&(inboxes[0])), i % 2);
          if (t == 32 && (i == 0 || sample != PHASES_EARLY)) mhc::inbox_wait((&(inboxes[2])), i % 2);
          if (t == 32) mhc::inbox_again((&(inboxes[2])), 4);
          if (t == 32 && sample != PHASES_EARLY) mhc::inbox_again((&(inboxes[0])), 128);
          total += float(i + 1) * shared[t - 32];
          if (sample != PHASES_UNREAD) __syncwarp();
          if (t == 32) mhc::send((&(sums[0])), (&(inboxes[1])), peer, 1.0f);
        }
      }
      if (t < 32) mhc::inbox_wait((&(inboxes[1])), 0);
      if (t >= 32) out[rank * 32 + t - 32] = total;
      break;
    }
    case LOAD_BULK:
    case LOAD_BULK4:
    case LOAD_BULK_APART:
      // A warp loads 32 floats, at once or in 4 rows that are 12 floats apart.
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 128);
      tl::cluster_sync();
      if (t < 32) {
        if (sample == LOAD_BULK4) {
          mhc::load_bulk4((&(shared[0])), 48, (&(in[rank * 32])), 32, 32, (&(inboxes[0])));
        } else {
          const int half = sample == LOAD_BULK_APART ? t / 16 * 16 : 0;
          mhc::load_bulk((&(shared[half])), (&(in[rank * 32])), 128, (&(inboxes[0])));
        }
        mhc::inbox_wait((&(inboxes[0])));
        out[rank * 32 + t] = shared[sample == LOAD_BULK4 ? t / 8 * 12 + t % 8 : t];
      }
      break;
    case LOAD_BEHIND:
    case LOAD_UNREAD:
      // Warp 0 loads twice into what warp 1 reads, and knows from a message that warp 1 has read.
      if (t == 0) mhc::inbox_open((&(inboxes[0])), 4);
      if (t == 0) mhc::gate_open((&(inboxes[1])), 8);
      tl::cluster_sync();
      acc[0] = 0.0f;
      for (int i = 0; i < 2; ++i) {
        if (t < 8) {
          if (i == 1 && sample == LOAD_BEHIND) mhc::inbox_wait((&(inboxes[0])));
          mhc::load_stream16((&(sums[t * 4])), (&(in[i * 32 + t * 4])));
          if (i == 1 && sample == LOAD_UNREAD) mhc::inbox_wait((&(inboxes[0])));
          mhc::loads_wait();
          mhc::gate_pass((&(inboxes[1])));
        }
        if (t >= 32) {
          mhc::gate_wait((&(inboxes[1])), i);
          acc[0] += sums[t - 32];
          __syncwarp();
          if (t == 32 && i == 0) mhc::send((&(shared[0])), (&(inboxes[0])), rank, 1.0f);
        }
      }
      if (t >= 32) out[rank * 32 + t - 32] = acc[0];
      break;
  }
}
