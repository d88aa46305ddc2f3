// What the tests of the emulation run: one kernel, so that it is built once; `sample` says what it does.
// In the form of TileLang's output, for the translation: parameters, declarations of shared memory.

enum Sample {
  // refused
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
  // poison
  NOTHING,
  READ_IN_FRONT,
  READ_SHARED,
  READ_LOCAL,
  // dependency
  AFTER_DEPENDENCY,
  ONE_THREAD_WAITS,
  // arithmetic
  SHUFFLE_XOR,
  SHUFFLE_XOR_OF_8,
  SHUFFLE,
  SHUFFLE_OF_4,
  SHUFFLE_DOWN_OF_16,
  SHUFFLE_UP_OF_16,
  REDUCE,
  MMA,
  SPLIT3,
  // order of memory, in one CTA
  BY_SYNCTHREADS,
  BY_SYNCWARP,
  BY_NAMED_BARRIER,
  BY_ARRIVE,
  BY_SHUFFLE,
  BY_NOTHING,
  // order of memory, between two CTAs
  SAME_ELEMENTS,
  OWN_ELEMENTS,
  RELEASE,
  RELAXED,
  RELEASE_WITHOUT_RESULT,
};

extern "C" __global__ void __launch_bounds__(64, 1) sample_kernel(float* out, const float* in, int* counter, int sample) {
  extern __shared__ __align__(1024) float shared[];
  __shared__ __align__(16) float sums[64];
  float local[4];
  float acc[4];
  uint terms[3];
  const int t = ((int)threadIdx.x);
  const uint full = (uint)4294967295;
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

    case NOTHING: break;
    case READ_IN_FRONT: out[t] = in[t - 1]; break;
    case READ_SHARED: out[t] = shared[t] * sums[t]; break;
    case READ_LOCAL: out[t] = local[t % 4]; break;

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
    case MMA:  // each lane has 6 words of operands in `in` and leaves 4 results
      if (t < 32) {
        const uint* word = (const uint*)in + t * 6;
        for (int i = 0; i < 4; ++i) acc[i] = float(i);
        mhc::mma_bf16(acc, word, word[4], word[5]);
        for (int i = 0; i < 4; ++i) out[t * 4 + i] = acc[i];
      }
      break;
    case SPLIT3: {  // the parts of in[t] and of -in[t] added up again, smallest first
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
    case BY_SHUFFLE:
    case BY_NOTHING:
      // the even lanes write for the odd ones
      if (t % 2 == 0) shared[t] = in[t];
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
      // CTA 0 writes, raises the counter, and CTA 1 reads
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
  }
}
