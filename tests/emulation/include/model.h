// Indices of threads and CTAs, and how the emulation refuses to go on.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <unistd.h>

namespace emulation {

constexpr unsigned WARP = 32;
constexpr int FAILURE = 3;  // exit status of everything that the emulation refuses

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

// The thread that runs; null outside of a kernel.
Thread* self();

// Prints what went wrong and in which thread, and ends the process.
[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulation: ", stderr);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (const Thread* thread = self()) {
    const Dim3 &t = thread->index, &c = thread->cta_index;
    std::fprintf(stderr, " [thread (%u, %u, %u) of CTA (%u, %u, %u)]", t.x, t.y, t.z, c.x, c.y, c.z);
  }
  std::fputc('\n', stderr);
  std::fflush(stderr);
  _exit(FAILURE);
}

}  // namespace emulation
