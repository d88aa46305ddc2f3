// This header has memory between guard pages, so that an access out of bounds is caught and not
// only a wrong result.
#pragma once

#include <cstring>
#include <sys/mman.h>

#include "../include/runtime.h"

namespace emulation {

// GuardedMemory has `bytes` bytes, the last of which lies right before a page that nobody may
// touch. The rest, between the page before and the first byte, can be checked for stray writes. The
// start is aligned to 16 bytes and no better, which is the least that a kernel may rely on.
class GuardedMemory {
 public:
  // This is NaN as fp32 and as bf16, and -1 as an integer.
  static constexpr unsigned char POISON = 0xff;
  static constexpr size_t ALIGNMENT = 16, PAGE = 4096;

  explicit GuardedMemory(size_t bytes) : bytes_(bytes), pages_(round_up(bytes, PAGE)) {
    void* base = mmap(nullptr, pages_ + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) fail("no memory for %zu bytes", bytes);
    first_page_ = static_cast<unsigned char*>(base) + PAGE;
    protect(PROT_READ | PROT_WRITE);
    std::memset(first_page_, POISON, pages_);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(first_page_ - PAGE, pages_ + 2 * PAGE); }

  unsigned char* data() const { return first_page_ + pages_ - round_up(bytes_, ALIGNMENT); }
  size_t size() const { return bytes_; }
  void poison() { std::memset(data(), POISON, bytes_); }

  void protect(int protection) const {
    if (pages_ != 0 && mprotect(first_page_, pages_, protection) != 0) fail("mprotect failed");
  }

  // The function returns whether the bytes around the data, on the pages that may be touched, are
  // as they were.
  bool intact() const {
    for (const unsigned char* p = first_page_; p < data(); ++p)
      if (*p != POISON) return false;
    for (const unsigned char* p = data() + bytes_; p < first_page_ + pages_; ++p)
      if (*p != POISON) return false;
    return true;
  }

  // These return whether an address lies in the data, or in the pages around the data.
  bool holds(const void* address) const {
    return address >= data() && address < data() + bytes_;
  }
  bool guards(const void* address) const {
    return address >= first_page_ - PAGE && address < first_page_ + pages_ + PAGE;
  }

 private:
  static size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

  size_t bytes_, pages_;
  unsigned char* first_page_;
};

}  // namespace emulation
