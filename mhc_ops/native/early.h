// This header decides on early reading: may a kernel read fn before the previous kernel has
// finished?
//
// mhc_ops/native/early.py has the rules.

#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

#include <ATen/core/Tensor.h>

namespace {

namespace early {

// A Read says what a call reads. As long as the table has an entry, the entry's weak reference
// keeps the tensor's address from being given to another tensor, but not the tensor's memory from
// being freed.
struct Read {
  uint32_t version;  // The content has this version before the launch.
  const void* data;  // Assigning to .data changes this and leaves the version.
  uint64_t capture;  // The call is in this capture; 0 is none.
};

struct Look {
  bool allowed = false;
  bool news = false;  // The read is to be added once its launch has succeeded.
  Read read{};
};

struct Entry {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  Read read;
};

constexpr size_t kFirstSweep = 256;

std::mutex mutex;
size_t next_sweep = kFirstSweep;

std::unordered_map<const c10::TensorImpl*, Entry>& table() {
  static auto* const reads = new std::unordered_map<const c10::TensorImpl*, Entry>();
  return *reads;
}

template <typename Capture>
Look look(c10::TensorImpl* fn, const Capture& capture) {
  if (fn->is_inference()) {
    return {};
  }
  Look result;
  result.read.version = fn->version_counter().current_version();
  result.read.data = std::as_const(*fn).data();
  std::optional<uint64_t> same;  // An earlier read of the same content was in this capture.
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = table().find(fn);
    if (found != table().end() && found->second.read.version == result.read.version &&
        found->second.read.data == result.read.data) {
      same = found->second.read.capture;
    }
  }
  if (same != 0) {  // There was no earlier read, or one in a capture.
    result.read.capture = capture();
  }
  result.allowed = same == 0 || same == result.read.capture;
  result.news = !result.allowed;
  return result;
}

void add(c10::TensorImpl* fn, const Read& read) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto& reads = table();
  const auto found = reads.find(fn);
  if (found != reads.end()) {
    found->second.read = read;
    return;
  }
  // Tensors die without notice, so their entries leave the table whenever the table has doubled.
  if (reads.size() >= next_sweep) {
    for (auto entry = reads.begin(); entry != reads.end();) {
      entry = entry->second.tensor.expired() ? reads.erase(entry) : std::next(entry);
    }
    next_sweep = std::max(kFirstSweep, 2 * reads.size());
  }
  c10::raw::weak_intrusive_ptr::incref(fn);
  reads.emplace(fn, Entry{c10::weak_intrusive_ptr<c10::TensorImpl>::reclaim(fn), read});
}

}  // namespace early

}  // namespace
