// The short way of mhc::fused_post_pre: what a call costs on the host when it is one launch.
//
// The Python kernels spend 72 us of a slow host on a call: checks, five allocations, fifteen views.
// Here stand two boxed kernels in front of them. They take a call only where everything is as
// nearly every call brings it and the kernel it needs has run before (a plan is remembered); any
// other call goes on to the Python kernels, untouched, which serve it or say what is wrong.
//
// BackendSelect lies right above the kernels of the backends and below everything else (autograd,
// dispatch modes, fake tensors, functionalization, functorch), so what reaches it is a plain call
// also where autograd is skipped, as in inference mode. Getting there through the Python autograd
// kernel costs more than the rest of the call, so AutogradCUDA is taken as well, where the key set
// has nothing between autograd and the backend.
//
// No Python is needed: callers need not hold the GIL. mhc_ops/host.py builds and loads this file.

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty_ops.h>
#include <c10/core/Allocator.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

// Part of torch's stable C interface, in libtorch_cuda.so; a CPU build of torch has none.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

// Part of Python's stable C interface, in every process that has Python; any other has none.
extern "C" {
__attribute__((weak)) int Py_IsInitialized();
__attribute__((weak)) int PyGILState_Ensure();
__attribute__((weak)) void PyGILState_Release(int state);
}

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IntArrayRef;
using torch::jit::Stack;

// mhc_ops/dispatch.py has the same: HC_MULT, MIXES
constexpr int64_t kHcMult = 4;
constexpr int64_t kMixes = kHcMult * (kHcMult + 2);
// mhc_ops/_checks.py: MOST_ROUNDS
constexpr int64_t kMostRounds = 10000;
constexpr uintptr_t kAlignment = 16;  // bytes: the kernel loads and stores 16 bytes a thread

// Positions of the schema's arguments, mhc_ops/_library.py.
enum Argument {
  kX,
  kResidual,
  kPostLayerMix,
  kCombResMix,
  kFn,
  kHcScale,
  kHcBase,
  kRmsEps,
  kHcPreEps,
  kHcSinkhornEps,
  kHcPostMultValue,
  kSinkhornRepeat,
  kNormWeight,
  kNormEps,
  kArguments
};

// ------------------------------------------------------------------------------------------ plans

// A kernel that has run on a device. Plans are few (hidden sizes times two a device), never change
// and live as long as the process, so that a call finds its own without a lock.
struct Plan {
  c10::Device device;
  int64_t hidden;
  bool norm;
  TVMFFIObjectHandle function;
  std::vector<int32_t> group_tokens;  // of 1, 2, ... tokens; a call with more has no plan
  const Plan* next;
};

std::atomic<const Plan*> plans{nullptr};
std::mutex plans_mutex;  // of those who add one
std::atomic<int64_t> calls{0};

const Plan* find_plan(c10::Device device, int64_t hidden, bool norm) {
  const Plan* plan = plans.load(std::memory_order_acquire);
  while (plan != nullptr &&
         !(plan->hidden == hidden && plan->norm == norm && plan->device == device)) {
    plan = plan->next;
  }
  return plan;
}

// ---------------------------------------------------------------------------------- early reading

// A projection that an earlier call has read. The weak reference keeps the address from being
// given to another tensor as long as the entry stands, not the tensor's memory from being freed.
struct Read {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  uint32_t version;
  const void* data;  // assigning to .data changes it and leaves the version
};

constexpr size_t kFirstSweep = 256;

std::mutex reads_mutex;
size_t next_sweep = kFirstSweep;

// never destroyed: calls from other threads may outlast the destructors of static objects
std::unordered_map<const c10::TensorImpl*, Read>& reads() {
  static auto* const table = new std::unordered_map<const c10::TensorImpl*, Read>();
  return *table;
}

// See mhc_ops/host.py, may_read_early.
bool may_read_early(c10::TensorImpl* fn) {
  if (fn->is_inference()) {
    return false;
  }
  const uint32_t version = fn->version_counter().current_version();
  const void* const data = std::as_const(*fn).data();
  const std::lock_guard<std::mutex> lock(reads_mutex);
  auto& table = reads();
  const auto found = table.find(fn);
  if (found != table.end()) {
    const bool unchanged = found->second.version == version && found->second.data == data;
    found->second.version = version;
    found->second.data = data;
    return unchanged;
  }
  // tensors die without notice: whenever the table has doubled, the dead leave it
  if (table.size() >= next_sweep) {
    for (auto entry = table.begin(); entry != table.end();) {
      entry = entry->second.tensor.expired() ? table.erase(entry) : std::next(entry);
    }
    next_sweep = std::max(kFirstSweep, 2 * table.size());
  }
  c10::raw::weak_intrusive_ptr::incref(fn);
  table.emplace(fn, Read{c10::weak_intrusive_ptr<c10::TensorImpl>::reclaim(fn), version, data});
  return false;
}

// --------------------------------------------------------------------------------------- the call

// The arguments of the TileLang program, in its order.
class Call {
 public:
  explicit Call(c10::Device device)
      : device_{device.is_cuda() ? kDLCUDA : kDLCPU, std::max<int32_t>(device.index(), 0)} {}

  void tensor(const Tensor& tensor, std::initializer_list<int64_t> shape) {
    View& view = views_[tensors_++];
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      view.shape[i] = shape.begin()[i];
      view.strides[i] = stride;
      stride *= view.shape[i];
    }
    view.tensor.data = const_cast<void*>(tensor.const_data_ptr());
    view.tensor.device = device_;
    view.tensor.ndim = static_cast<int32_t>(shape.size());
    view.tensor.dtype = tensor.scalar_type() == at::kBFloat16 ? DLDataType{kDLBfloat, 16, 1}
                                                               : DLDataType{kDLFloat, 32, 1};
    view.tensor.shape = view.shape;
    view.tensor.strides = view.strides;
    view.tensor.byte_offset = 0;
    next(kTVMFFIDLTensorPtr).v_ptr = &view.tensor;
  }

  void number(double value) { next(kTVMFFIFloat).v_float64 = value; }

  void number(int64_t value) { next(kTVMFFIInt).v_int64 = value; }

  // Runs the function on torch's current stream of the device, which the kernel asks tvm-ffi for.
  void run(TVMFFIObjectHandle function) {
    void* stream = nullptr;
    if (device_.device_type == kDLCUDA) {
      TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_.device_id, &stream) == 0,
                  "mhc::fused_post_pre: torch has no current stream of CUDA device ",
                  device_.device_id);
    }
    void* previous = nullptr;
    TORCH_CHECK(
        TVMFFIEnvSetStream(device_.device_type, device_.device_id, stream, &previous) == 0,
        "mhc::fused_post_pre: ", raised());
    TVMFFIAny result{};  // None, which is what kernels return
    const int status = TVMFFIFunctionCall(function, arguments_.data(), count_, &result);
    TVMFFIEnvSetStream(device_.device_type, device_.device_id, previous, nullptr);
    TORCH_CHECK(status == 0, "mhc::fused_post_pre: ", raised());
  }

 private:
  static constexpr int kMaxTensors = 12;
  static constexpr int kMaxArguments = kMaxTensors + 8;

  struct View {
    DLTensor tensor;
    int64_t shape[3];
    int64_t strides[3];
  };

  TVMFFIAny& next(int32_t type_index) {
    TVMFFIAny& argument = arguments_[count_++];
    argument.type_index = type_index;
    argument.zero_padding = 0;
    return argument;
  }

  static std::string raised() {
    TVMFFIObjectHandle error = nullptr;
    TVMFFIErrorMoveFromRaised(&error);
    if (error == nullptr) {
      return "the kernel could not be launched";
    }
    const TVMFFIErrorCell* const cell = TVMFFIErrorGetCellPtr(error);
    std::string text = std::string(cell->kind.data, cell->kind.size) + ": " +
                       std::string(cell->message.data, cell->message.size);
    TVMFFIObjectDecRef(error);
    return text;
  }

  DLDevice device_;
  std::array<View, kMaxTensors> views_;
  std::array<TVMFFIAny, kMaxArguments> arguments_;
  int tensors_ = 0;
  int count_ = 0;
};

// As nearly every call brings it: contiguous, of this dtype and of shape [*leading, *tail].
bool is_dense(const Tensor& tensor, c10::Device device, at::ScalarType dtype, IntArrayRef leading,
              std::initializer_list<int64_t> tail) {
  if (tensor.scalar_type() != dtype || tensor.device() != device || !tensor.is_contiguous()) {
    return false;
  }
  const IntArrayRef sizes = tensor.sizes();
  return sizes.size() == leading.size() + tail.size() &&
         std::equal(leading.begin(), leading.end(), sizes.begin()) &&
         std::equal(tail.begin(), tail.end(), sizes.begin() + leading.size());
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
}

bool is_number(const c10::IValue& value, double least) {
  return value.isDouble() && value.toDouble() >= least && value.toDouble() <= DBL_MAX;
}

// The device of a call as the current one. Restoring costs more than asking, so a device that was
// current already is left alone: TileLang's host code sets that one too.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device)
      : devices_(device.type()), device_(device), before_(devices_.exchangeDevice(device)) {}
  ~OnDevice() {
    if (before_ != device_) {
      devices_.uncheckedSetDevice(before_);
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  c10::impl::VirtualGuardImpl devices_;
  c10::Device device_;
  c10::Device before_;
};

// Memory of its own for each output, as torch.empty gives it on the current device, but without a
// round of dispatch and two guards of the device for each.
class Allocation {
 public:
  explicit Allocation(c10::Device device)
      : device_(device),
        filled_(at::globalContext().deterministicAlgorithms() &&
                at::globalContext().deterministicFillUninitializedMemory()),
        // asked for in each call: torch.cuda.memory can put another in its place
        allocator_(device.is_cuda() ? at::detail::getCUDAHooks().getCUDADeviceAllocator()
                                    : c10::GetAllocator(device.type())) {}

  Tensor empty(IntArrayRef sizes, at::ScalarType dtype) const {
    const DispatchKeySet backend(device_.is_cuda() ? DispatchKey::CUDA : DispatchKey::CPU);
    if (filled_) {
      return at::_ops::empty_memory_format::redispatch(
          backend, c10::fromIntArrayRefSlow(sizes), dtype, at::kStrided, device_,
          /*pin_memory=*/false, /*memory_format=*/std::nullopt);
    }
    return Tensor(at::detail::empty_generic(sizes, allocator_, backend, dtype, std::nullopt));
  }

 private:
  c10::Device device_;
  bool filled_;
  c10::Allocator* allocator_;
};

// Plain strided tensors of one backend, and nothing left to do before its kernel: no dispatch mode,
// subclass, functionalization, functorch, conjugate or negative view.
bool is_plain(DispatchKeySet keys) {
  constexpr DispatchKeySet cuda{DispatchKey::CUDA, DispatchKey::BackendSelect,
                                DispatchKey::ADInplaceOrView};
  constexpr DispatchKeySet cpu{DispatchKey::CPU, DispatchKey::BackendSelect,
                               DispatchKey::ADInplaceOrView};
  // raw: operators on the sets themselves leave the bits of the backends alone
  return (keys.raw_repr() & ~cuda.raw_repr()) == 0 || (keys.raw_repr() & ~cpu.raw_repr()) == 0;
}

// Whether letting go of it takes the GIL: together, the references that C++ has to a tensor of
// Python's count as one of Python's, and this is the last of them.
bool is_last_of_cpp(const c10::IValue& argument) {
  return argument.isTensor() && argument.toTensor().use_count() == 2 &&
         argument.toTensor().unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr;
}

// Most often all tensors are such, and torch takes the GIL anew for each. Where it is held, that is
// next to nothing, so it is taken once around all of them.
void drop_arguments(Stack* stack) {
  const auto arguments = torch::jit::last(*stack, kArguments);
  if (PyGILState_Release != nullptr && PyGILState_Ensure != nullptr &&
      Py_IsInitialized != nullptr && Py_IsInitialized() != 0 &&
      std::any_of(arguments.begin(), arguments.end(), is_last_of_cpp)) {
    const int state = PyGILState_Ensure();
    torch::jit::drop(*stack, kArguments);
    PyGILState_Release(state);
  } else {
    torch::jit::drop(*stack, kArguments);
  }
}

// Replaces the arguments by the outputs, or leaves them and returns false.
bool take(DispatchKeySet keys, Stack* stack) {
  if (!is_plain(keys)) {
    return false;
  }
  const auto arguments = torch::jit::last(*stack, kArguments);
  const Tensor& x = arguments[kX].toTensor();
  const Tensor& residual = arguments[kResidual].toTensor();
  const Tensor& post_layer_mix = arguments[kPostLayerMix].toTensor();
  const Tensor& comb_res_mix = arguments[kCombResMix].toTensor();
  const Tensor& fn = arguments[kFn].toTensor();
  const Tensor& hc_scale = arguments[kHcScale].toTensor();
  const Tensor& hc_base = arguments[kHcBase].toTensor();
  const bool norm = !arguments[kNormWeight].isNone();

  if (!residual.defined() || residual.dim() < 3) {
    return false;
  }
  const c10::Device device = residual.device();
  const IntArrayRef leading = residual.sizes().slice(0, residual.dim() - 2);
  const int64_t hidden = residual.size(-1);
  const Plan* const plan = find_plan(device, hidden, norm);
  if (plan == nullptr) {
    return false;
  }
  const int64_t tokens = residual.numel() / (kHcMult * hidden);
  if (tokens < 1 || tokens > static_cast<int64_t>(plan->group_tokens.size())) {
    return false;
  }

  constexpr auto bf16 = at::kBFloat16;
  constexpr auto fp32 = at::kFloat;
  const bool served =
      is_dense(residual, device, bf16, leading, {kHcMult, hidden}) && is_aligned(residual) &&
      is_dense(x, device, bf16, leading, {hidden}) && is_aligned(x) &&
      (is_dense(post_layer_mix, device, fp32, leading, {kHcMult, 1}) ||
       is_dense(post_layer_mix, device, fp32, leading, {kHcMult})) &&
      is_aligned(post_layer_mix) &&
      is_dense(comb_res_mix, device, fp32, leading, {kHcMult, kHcMult}) &&
      is_aligned(comb_res_mix) &&
      is_dense(fn, device, fp32, {}, {kMixes, kHcMult * hidden}) && is_aligned(fn) &&
      is_dense(hc_scale, device, fp32, {}, {3}) && is_dense(hc_base, device, fp32, {}, {kMixes}) &&
      is_number(arguments[kRmsEps], 0) && is_number(arguments[kHcPreEps], 0) &&
      is_number(arguments[kHcSinkhornEps], 0) &&
      is_number(arguments[kHcPostMultValue], -DBL_MAX) && arguments[kSinkhornRepeat].isInt() &&
      arguments[kSinkhornRepeat].toInt() >= 1 &&
      arguments[kSinkhornRepeat].toInt() <= kMostRounds &&
      (norm ? is_dense(arguments[kNormWeight].toTensor(), device, bf16, {}, {hidden}) &&
                  is_aligned(arguments[kNormWeight].toTensor()) &&
                  is_number(arguments[kNormEps], 0)
            : arguments[kNormEps].isNone());
  if (!served) {
    return false;
  }

  const OnDevice guard(device);
  const Allocation allocation(device);
  c10::SmallVector<int64_t, 6> sizes(residual.sizes().begin(), residual.sizes().end());
  Tensor residual_out = allocation.empty(sizes, bf16);
  sizes.back() = 1;
  Tensor post_mix = allocation.empty(sizes, fp32);
  sizes.back() = kHcMult;
  Tensor comb_mix = allocation.empty(sizes, fp32);
  sizes.pop_back();
  sizes.back() = hidden;
  Tensor layer_input = allocation.empty(sizes, bf16);

  // as launch_fused in mhc_ops/ops/fused_post_pre.py
  Call call(device);
  call.tensor(x, {tokens, hidden});
  call.tensor(residual, {tokens, kHcMult, hidden});
  call.tensor(post_layer_mix, {tokens, kHcMult, 1});
  call.tensor(comb_res_mix, {tokens, kHcMult, kHcMult});
  call.tensor(fn, {kMixes, kHcMult * hidden});
  call.tensor(hc_scale, {3});
  call.tensor(hc_base, {kMixes});
  if (norm) {
    call.tensor(arguments[kNormWeight].toTensor(), {hidden});
  }
  call.tensor(residual_out, {tokens, kHcMult, hidden});
  call.tensor(post_mix, {tokens, kHcMult, 1});
  call.tensor(comb_mix, {tokens, kHcMult, kHcMult});
  call.tensor(layer_input, {tokens, hidden});
  for (const int i : {kRmsEps, kHcPreEps, kHcSinkhornEps, kHcPostMultValue}) {
    call.number(arguments[i].toDouble());
  }
  call.number(arguments[kSinkhornRepeat].toInt());
  if (norm) {
    call.number(arguments[kNormEps].toDouble());
  }
  call.number(static_cast<int64_t>(plan->group_tokens[tokens - 1]));
  call.number(static_cast<int64_t>(may_read_early(fn.unsafeGetTensorImpl())));
  call.run(plan->function);
  calls.fetch_add(1, std::memory_order_relaxed);

  drop_arguments(stack);
  torch::jit::push(*stack, std::move(residual_out), std::move(post_mix), std::move(comb_mix),
                   std::move(layer_input));
  return true;
}

bool needs_grad(const Stack& stack) {
  if (!c10::GradMode::is_enabled()) {
    return false;
  }
  const auto arguments = torch::jit::last(stack, kArguments);
  return std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& argument) {
    return argument.isTensor() && argument.toTensor().requires_grad();
  });
}

// The key set that a kernel is given may hold the kernel's own key and those above it: under the
// Python dispatcher (tracing with symbolic sizes) it does.

void autograd(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const DispatchKeySet below = keys & c10::after_autograd_keyset;
  if (needs_grad(*stack) || !take(below, stack)) {
    // the Python kernel of all autograd keys still serves those that have none of their own here
    op.redispatchBoxed(below | DispatchKeySet(DispatchKey::AutogradOther), stack);
  }
}

void backend_select(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const DispatchKeySet below =
      keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
  if (!take(below, stack)) {
    op.redispatchBoxed(below, stack);
  }
}

}  // namespace

// A CPU has no kernel, so no plan either, but in tests, which give it one to see the arguments.
TORCH_LIBRARY_IMPL(mhc, AutogradCPU, library) {
  library.impl("fused_post_pre", torch::CppFunction::makeFromBoxedFunction<&autograd>());
}

TORCH_LIBRARY_IMPL(mhc, AutogradCUDA, library) {
  library.impl("fused_post_pre", torch::CppFunction::makeFromBoxedFunction<&autograd>());
}

TORCH_LIBRARY_IMPL(mhc, BackendSelect, library) {
  library.impl("fused_post_pre", torch::CppFunction::makeFromBoxedFunction<&backend_select>());
}

// ----------------------------------------------------------------------- what mhc_ops/host.py calls

#define MHC_EXPORT extern "C" __attribute__((visibility("default")))

MHC_EXPORT void mhc_remember(int32_t cuda, int32_t device_index, int64_t hidden, int32_t norm,
                             TVMFFIObjectHandle function, const int32_t* group_tokens,
                             int64_t count) {
  const c10::Device device(cuda != 0 ? c10::kCUDA : c10::kCPU,
                           static_cast<c10::DeviceIndex>(device_index));
  TVMFFIObjectIncRef(function);
  auto* const plan =
      new Plan{device, hidden, norm != 0, function, {group_tokens, group_tokens + count}, nullptr};
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plan->next = plans.load(std::memory_order_relaxed);
  plans.store(plan, std::memory_order_release);
}

// Their memory stays: another thread may be at them.
MHC_EXPORT void mhc_forget() {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plans.store(nullptr, std::memory_order_release);
}

MHC_EXPORT int32_t mhc_may_read_early(c10::TensorImpl* fn) { return may_read_early(fn); }

MHC_EXPORT int64_t mhc_calls() { return calls.load(std::memory_order_relaxed); }

MHC_EXPORT int64_t mhc_tracked() {
  const std::lock_guard<std::mutex> lock(reads_mutex);
  return static_cast<int64_t>(reads().size());
}
