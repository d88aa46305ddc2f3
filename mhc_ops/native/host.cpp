// The short way of an eager call: what a call of any op costs on the host when everything is as
// nearly every call brings it.
//
// The long way (mhc_ops/native/serve.py) takes several times as long, for its checks, allocations
// and ctypes. Here stand two boxed kernels in front of each op. They take a call only where a plan
// says what the call must be like and the kernels of the plan are loaded; any other call goes on to
// the Python kernels, untouched, which serve the call or say what is wrong.
//
// BackendSelect lies right above the kernels of the backends and below everything else (autograd,
// dispatch modes, fake tensors, functionalization, functorch), so what reaches it is a plain call
// also where autograd is skipped, as in inference mode. Getting there through the Python autograd
// kernel costs more than the rest of the call, so AutogradCUDA is taken as well, where the key set
// has nothing between autograd and the backend.
//
// No Python is needed: callers need not hold the GIL. mhc_ops/native/host.py builds and loads this
// file, and describes ops and plans to it; in a process without Python standalone.h does.
//
// The parts stand in headers of their own, of which this is the one translation unit.

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include <torch/library.h>

#include "call.h"
#include "early.h"
#include "plan.h"
#include "standalone.h"

namespace {

// The key set that a kernel is given may hold the kernel's own key and those above it: under the
// Python dispatcher (tracing with symbolic sizes) it does.

struct Autograd final : c10::OperatorKernel {
  explicit Autograd(const Op* op) : op_(op) {}
  void operator()(const c10::OperatorHandle& handle, DispatchKeySet keys, Stack* stack) {
    const DispatchKeySet below = keys & c10::after_autograd_keyset;
    if (needs_grad(*stack, op_->arguments) || !take(*op_, below, stack)) {
      // the kernel of all autograd keys still serves those that have none of their own here
      handle.redispatchBoxed(below | DispatchKeySet(DispatchKey::AutogradOther), stack);
    }
  }

 private:
  const Op* op_;
};

struct BackendSelect final : c10::OperatorKernel {
  explicit BackendSelect(const Op* op) : op_(op) {}
  void operator()(const c10::OperatorHandle& handle, DispatchKeySet keys, Stack* stack) {
    const DispatchKeySet below =
        keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
    if (!take(*op_, below, stack)) {
      handle.redispatchBoxed(below, stack);
    }
  }

 private:
  const Op* op_;
};

void put_in_front(const Op* op) {
  // A CPU has no kernel, so no plan either, but in tests, which give it one to see the arguments.
  implement<Autograd>(op, DispatchKey::AutogradCPU);
  implement<Autograd>(op, DispatchKey::AutogradCUDA);
  implement<BackendSelect>(op, DispatchKey::BackendSelect);
}

}  // namespace

#define MHC_EXPORT extern "C" __attribute__((visibility("default")))

// ------------------------------------------------------------- what a process without Python calls

// Serves the ops with the kernels of a folder that `python -m mhc_ops build` has filled, where nothing
// else does: defines them, and from then on a call on a CUDA device loads the kernels that its hidden
// size needs, once. To be called before a package with the ops in it is loaded.
//
// folder: null for the one that this library lies in.
// Returns null, or what is wrong, valid until the thread calls it again.
MHC_EXPORT const char* mhc_serve(const char* folder) {
  static std::mutex one_at_a_time;
  thread_local std::string wrong;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  try {
    for (const Op* const op : standalone::open(folder)) {
      put_in_front(op);
      standalone::register_kernels(op);
    }
    return nullptr;
  } catch (const c10::Error& error) {
    wrong = error.what_without_backtrace();
  } catch (const std::exception& error) {
    wrong = error.what();
  }
  return wrong.c_str();
}

// For tests, which have no GPU: calls on CPU tensors are served as if they stood on device 0.
MHC_EXPORT void mhc_serve_cpu() { standalone::cpu_is_device = true; }

// ----------------------------------------------------------------- what mhc_ops/native/host.py calls

MHC_EXPORT void mhc_use_launcher(decltype(Launcher::launch) launch,
                                 decltype(Launcher::capture) capture,
                                 decltype(Launcher::explain_launch) explain_launch) {
  launcher = {launch, capture, explain_launch};
}

// Puts the short way in front of an op; returns its number, -1 where it has too many arguments.
MHC_EXPORT int64_t mhc_define(const char* name, int64_t arguments, int64_t streams,
                              int64_t streams_tail, int64_t norm_weight) {
  if (arguments > static_cast<int64_t>(kMostArguments)) {
    return -1;
  }
  auto* const op = new Op{name, static_cast<size_t>(arguments), static_cast<size_t>(streams),
                          streams_tail, norm_weight};
  const std::lock_guard<std::mutex> lock(ops_mutex);
  ops().push_back(op);
  put_in_front(op);
  return static_cast<int64_t>(ops().size()) - 1;
}

// From now on, calls that this plan can serve take the short way.
MHC_EXPORT void mhc_remember(int64_t op, int32_t cuda, int32_t device_index, int64_t hidden,
                             int32_t norm, const int64_t* words) {
  Words reader(words);
  const auto* const plan = new Plan(reader);
  const c10::Device device(cuda != 0 ? c10::kCUDA : c10::kCPU,
                           static_cast<c10::DeviceIndex>(device_index));
  remember(*ops()[op], device, hidden, norm != 0, plan);
}

// The plans' memory stays: another thread may be at them.
MHC_EXPORT void mhc_forget() {
  const std::lock_guard<std::mutex> lock(ops_mutex);
  for (Op* const op : ops()) {
    for (Place* place = op->places.load(); place != nullptr; place = place->next) {
      place->plan.store(nullptr, std::memory_order_release);
    }
  }
}

MHC_EXPORT int64_t mhc_calls() { return calls.load(std::memory_order_relaxed); }

// Returns whether a call may read early; says whether, and what, is to be added.
MHC_EXPORT int32_t mhc_early_look(c10::TensorImpl* fn, uint64_t capture, int32_t* news,
                                  early::Read* read) {
  const early::Look look = early::look(fn, [capture] { return capture; });
  *news = look.news;
  *read = look.read;
  return look.allowed;
}

MHC_EXPORT void mhc_early_add(c10::TensorImpl* fn, const early::Read* read) {
  early::add(fn, *read);
}

MHC_EXPORT int64_t mhc_early_size() {
  const std::lock_guard<std::mutex> lock(early::mutex);
  return static_cast<int64_t>(early::table().size());
}
