// What kernels see of the runtime, which is compiled apart: ../runtime/runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace emulation {

constexpr unsigned WARP = 32;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
  Dim3 at(unsigned linear) const { return {linear % x, linear / x % y, linear / x / y}; }
};

struct Cta;

struct Thread {
  Dim3 index;           // threadIdx
  unsigned linear = 0;  // threadIdx in one dimension
  Cta* cta = nullptr;
  Dim3 cta_index;  // blockIdx
  unsigned lane() const { return linear % WARP; }
  unsigned warp() const { return linear / WARP; }
};

// The CUDA thread that runs; null outside of a kernel.
#ifdef EMULATION_THREADS
extern __thread Thread* running;
#else
extern Thread* running;
#endif

// Prints what went wrong and in which thread, and ends the process.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

const Dim3& threads_of_cta();
const Dim3& ctas_of_grid();

void* dynamic_shared();
// The memory of a __shared__ array; `declaration` is anything with its own address.
void* static_shared(const void* declaration, size_t bytes);

// bar.sync and bar.arrive; 0 threads are all of the CTA.
void wait_at_barrier(unsigned barrier, unsigned threads);
void arrive_at_barrier(unsigned barrier, unsigned threads);
void wait_for_warp(unsigned mask);

// Gives `value` to the lanes in `mask`, which must all come here, and takes theirs: `values` has room
// for one of each lane.
void exchange(unsigned mask, const void* value, size_t bytes, void* values);

// The barrier of all threads of a cluster; whether the arrival orders what was done before it.
void arrive_at_cluster(bool orders);
void wait_for_cluster();
unsigned rank_in_cluster();

// See mhc_device.h. The slot and the inbox of CTA `rank` are given by this CTA's own addresses.
void open_inbox(void* inbox, unsigned bytes);
void wait_for_inbox(void* inbox, int parity);
void arm_inbox(void* inbox, unsigned bytes);
void send(const char* operation, void* slot, void* inbox, int rank, const void* data, size_t bytes);
void fence_bulk();
void load_bulk(void* shared, const void* global, unsigned bytes, void* inbox);
void open_gate(void* gate, unsigned count);
void pass_gate(void* gate);
void wait_for_gate(void* gate, int parity);

// Loads 16 bytes, which are there after a wait that covers their group.
void load(const char* operation, void* shared, const void* global);
void commit_loads();
// For all groups but the last so many that were committed.
void wait_for_loads(unsigned groups);

void wait_for_dependency();

// Lets other threads run: called in loops that wait for a value in memory.
void yield();

// Parameter i of the kernel, checked against what it was passed as.
void* pointer_argument(unsigned i, bool is_const);
double floating_argument(unsigned i);
long long integer_argument(unsigned i);

// Runs a kernel of so many parameters as the words of the command line say.
int launch(int count, char** words, unsigned parameters, void (*kernel)());

// A kernel as a function without parameters, which fetches its arguments.
template <auto kernel>
struct Call;

template <class... P, void (*kernel)(P...)>
struct Call<kernel> {
  static constexpr unsigned parameters = sizeof...(P);

  static void run() { run(std::make_integer_sequence<unsigned, parameters>()); }

 private:
  template <unsigned... I>
  static void run(std::integer_sequence<unsigned, I...>) {
    kernel(argument<P>(I)...);
  }
  template <class T>
  static T argument(unsigned i) {
    if constexpr (std::is_pointer_v<T>)
      return static_cast<T>(pointer_argument(i, std::is_const_v<std::remove_pointer_t<T>>));
    else if constexpr (std::is_floating_point_v<T>)
      return T(floating_argument(i));
    else
      return T(integer_argument(i));
  }
};

}  // namespace emulation
