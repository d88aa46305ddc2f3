// Kernels see this of the runtime, which is compiled apart: ../runtime/runtime.cpp.
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
  Dim3 index;           // This is threadIdx.
  unsigned linear = 0;  // This is threadIdx in one dimension.
  Cta* cta = nullptr;
  Dim3 cta_index;  // This is blockIdx.
  unsigned lane() const { return linear % WARP; }
  unsigned warp() const { return linear / WARP; }
};

// This is the CUDA thread that runs; it is null outside of a kernel.
#ifdef EMULATION_THREADS
extern __thread Thread* running;
#else
extern Thread* running;
#endif

// The function prints what went wrong and in which thread, and ends the process.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

const Dim3& threads_of_cta();
const Dim3& ctas_of_grid();

void* dynamic_shared();
// The function returns the memory of a __shared__ array; `declaration` is anything with its own
// address.
void* static_shared(const void* declaration, size_t bytes);

// These are bar.sync and bar.arrive; 0 threads stand for all threads of the CTA.
void wait_at_barrier(unsigned barrier, unsigned threads);
void arrive_at_barrier(unsigned barrier, unsigned threads);
void wait_for_warp(unsigned mask);

// The function gives `value` to the lanes in `mask`, which must all call it, and takes the values
// of those lanes: `values` has room for a value of each lane.
void exchange(unsigned mask, const void* value, size_t bytes, void* values);

// All threads of a cluster have this barrier; `orders` says whether an arrival orders what was done
// before it.
void arrive_at_cluster(bool orders);
void wait_for_cluster();
unsigned rank_in_cluster();

// mhc_device.h says what these do. This CTA's own addresses name the slot and the inbox of CTA
// `rank`.
void open_inbox(void* inbox, unsigned bytes);
void wait_for_inbox(void* inbox, int parity);
void arm_inbox(void* inbox, unsigned bytes);
void send(const char* operation, void* slot, void* inbox, int rank, const void* data, size_t bytes);
void fence_bulk();
void load_bulk(void* shared, const void* global, unsigned bytes, void* inbox);
void open_gate(void* gate, unsigned count);
void pass_gate(void* gate);
void wait_for_gate(void* gate, int parity);

// The function loads 16 bytes, which are there after a wait that covers their group.
void load(const char* operation, void* shared, const void* global);
void commit_loads();
// The function waits for all groups but the last so many that were committed.
void wait_for_loads(unsigned groups);

void wait_for_dependency();

// The function lets other threads run; loops that wait for a value in memory call it.
void yield();

// These return parameter i of the kernel, and check what it was passed as.
void* pointer_argument(unsigned i, bool is_const);
double floating_argument(unsigned i);
long long integer_argument(unsigned i);

// The function runs a kernel of so many parameters as the words of the command line say.
int launch(int count, char** words, unsigned parameters, void (*kernel)());

// Call makes a kernel a function without parameters, which fetches the arguments.
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
