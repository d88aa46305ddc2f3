// This file is the short way of an eager call, which serves calls as nearly all of them come.
//
// The long way (mhc_ops/native/serve.py) takes several times as long on the host, because of its
// checks, allocations and ctypes. The short way is two boxed kernels of each op, which the
// dispatcher calls before the op's Python kernels. The boxed kernels take a call only where a plan
// says what the call must be like and the kernels of the plan are loaded; any other call goes on,
// untouched, to the Python kernels, which serve the call or say what is wrong.
//
// BackendSelect lies right above the kernels of the backends and below everything else (autograd,
// dispatch modes, fake tensors, functionalization, functorch), so what reaches BackendSelect is a
// plain call also where autograd is skipped, as in inference mode. The way to BackendSelect through
// the Python autograd kernel costs more than the rest of the call, so the short way has a kernel of
// AutogradCUDA, too, for key sets with nothing between autograd and the backend.
//
// No Python is needed: callers need not hold the GIL. mhc_ops/native/host.py builds and loads this
// file, and gives it ops and plans; in a process without Python standalone.h does so.
//
// This file is the one translation unit, and the headers that it includes are its parts.

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

// Under the Python dispatcher (tracing with symbolic sizes), the key set that a kernel is given
// holds the kernel's own key and those above that key.

struct Autograd final : c10::OperatorKernel {
  explicit Autograd(const Op* op) : op_(op) {}
  void operator()(const c10::OperatorHandle& handle, DispatchKeySet keys, Stack* stack) {
    const DispatchKeySet below = keys & c10::after_autograd_keyset;
    if (needs_grad(*stack, op_->arguments) || has_tangent(*stack, op_->arguments) ||
        !take(*op_, below, stack)) {
      // The kernel of all autograd keys still serves the keys that have no kernel of their own.
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
  // A CPU has no kernels, and so no plans; tests alone give a CPU both, to see the arguments.
  implement<Autograd>(op, DispatchKey::AutogradCPU);
  implement<Autograd>(op, DispatchKey::AutogradCUDA);
  implement<BackendSelect>(op, DispatchKey::BackendSelect);
}

}  // namespace

#define MHC_EXPORT extern "C" __attribute__((visibility("default")))

// ----------------------------------------- A process without Python calls the following functions.

// The function defines the ops, where nothing else has defined them, and serves them with the
// kernels of a folder that `python -m mhc_ops build` has filled. From then on the first call on a
// CUDA device with a hidden size loads the kernels that the size needs. A process calls mhc_serve
// before it loads a package with the ops in it.
//
// A null folder stands for the folder that this library lies in.
// The function returns null, or a text that says what is wrong, valid until the same thread's next
// call of the function.
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

// Tests without a GPU call this: calls on CPU tensors are then served as if the tensors were on
// device 0.
MHC_EXPORT void mhc_serve_cpu() { standalone::cpu_is_device = true; }

// ------------------------------------------- mhc_ops/native/host.py calls the following functions.

MHC_EXPORT void mhc_use_launcher(decltype(Launcher::launch) launch,
                                 decltype(Launcher::capture) capture,
                                 decltype(Launcher::explain_launch) explain_launch) {
  launcher = {launch, capture, explain_launch};
}

// The function gives an op the short way and returns the op's number, or -1 where the op has too
// many arguments.
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

// From now on, calls that the plan can serve take the short way.
MHC_EXPORT void mhc_remember(int64_t op, int32_t cuda, int32_t device_index, int64_t hidden,
                             int32_t norm, const int64_t* words) {
  Words reader(words);
  const auto* const plan = new Plan(reader);
  const c10::Device device(cuda != 0 ? c10::kCUDA : c10::kCPU,
                           static_cast<c10::DeviceIndex>(device_index));
  remember(*ops()[op], device, hidden, norm != 0, plan);
}

// The plans' memory is not freed, because another thread may still read the plans.
MHC_EXPORT void mhc_forget() {
  const std::lock_guard<std::mutex> lock(ops_mutex);
  for (Op* const op : ops()) {
    for (Place* place = op->places.load(); place != nullptr; place = place->next) {
      place->plan.store(nullptr, std::memory_order_release);
    }
  }
}

MHC_EXPORT int64_t mhc_calls() { return calls.load(std::memory_order_relaxed); }

// The function returns whether a call may read early, and tells by `news` and `read` whether a read
// is to be added, and which.
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
