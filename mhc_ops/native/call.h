// This header decides whether a plan serves a call, and if so makes the outputs and the launches.

#pragma once

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include <dlfcn.h>

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
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include "early.h"
#include "plan.h"

// These are part of Python's stable C interface, so every process that has Python has them; in any
// other process they are null.
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
using c10::IValue;
using torch::jit::Stack;

// A thread of the kernels loads and stores so many bytes at once.
constexpr uintptr_t kAlignment = 16;

// These are functions of the launcher, launcher.c.
struct Launcher {
  int (*launch)(const void* kernel, unsigned grid_x, unsigned grid_y, void* stream,
                void** arguments);
  uint64_t (*capture)(const void* kernel, void* stream);
  void (*explain_launch)(const void* kernel, unsigned grid_x, unsigned grid_y, int result,
                         char* text, size_t size);
} launcher;

bool is_dense(const Tensor& tensor, c10::Device device, const Argument& wanted,
              IntArrayRef leading) {
  if (tensor.scalar_type() != wanted.dtype || tensor.device() != device ||
      !tensor.is_contiguous()) {
    return false;
  }
  const IntArrayRef sizes = tensor.sizes();
  const IntArrayRef before = wanted.per_token ? leading : IntArrayRef();
  const size_t tail = sizes.size() - before.size();
  if (sizes.size() < before.size() ||
      (tail != wanted.tail.size() && !(wanted.may_drop_last && tail + 1 == wanted.tail.size()))) {
    return false;
  }
  return std::equal(before.begin(), before.end(), sizes.begin()) &&
         std::equal(sizes.begin() + before.size(), sizes.end(), wanted.tail.begin()) &&
         !(wanted.rows &&
           reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment != 0);
}

// A number is served where fp32 holds it, without a subnormal; mhc_ops/_arguments.py says why.
bool is_float32(double value) {
  const double size = std::abs(value);
  return value == 0 || (size >= FLT_MIN && size <= FLT_MAX);
}

// Nearly every call brings what is served: contiguous tensors of the right kind and numbers in
// their ranges.
bool is_served(const IValue& given, c10::Device device, const Argument& wanted,
               IntArrayRef leading) {
  switch (wanted.kind) {
    case Argument::kTensor:
      return given.isTensor() && is_dense(given.toTensor(), device, wanted, leading);
    case Argument::kFloat:
      return given.isDouble() && given.toDouble() >= wanted.least && is_float32(given.toDouble());
    case Argument::kInt:
      return given.isInt() && given.toInt() >= wanted.first && given.toInt() <= wanted.last;
    default:
      return given.isNone();
  }
}

// OnDevice makes the device of a call the current one as long as the object lives. Setting a device
// costs more than asking which one is current, so a device that was current already is left alone.
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

// Allocation gives memory as torch.empty does on the current device, but without a round of
// dispatch and two guards of the device for each tensor (NOTES.md, "Outputs without dispatch").
class Allocation {
 public:
  explicit Allocation(c10::Device device)
      : device_(device),
        filled_(at::globalContext().deterministicAlgorithms() &&
                at::globalContext().deterministicFillUninitializedMemory()),
        // Each call asks for the allocator, because torch.cuda.memory can exchange it.
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

// A key set is plain where it stands for strided tensors of one backend and nothing is left to do
// before the backend's kernel: no dispatch mode, subclass, functionalization, functorch, conjugate
// or negative view.
bool is_plain(DispatchKeySet keys) {
  constexpr DispatchKeySet cuda{DispatchKey::CUDA, DispatchKey::BackendSelect,
                                DispatchKey::ADInplaceOrView};
  constexpr DispatchKeySet cpu{DispatchKey::CPU, DispatchKey::BackendSelect,
                               DispatchKey::ADInplaceOrView};
  // The raw sets are compared, because operators on the sets leave the bits of backends alone.
  return (keys.raw_repr() & ~cuda.raw_repr()) == 0 || (keys.raw_repr() & ~cpu.raw_repr()) == 0;
}

// The function tells whether dropping an argument takes the GIL. All references that C++ has to a
// tensor of Python's together count as one reference of Python's; dropping the last one gives that
// back, which takes the GIL.
bool is_last_of_cpp(const IValue& argument) {
  return argument.isTensor() && argument.toTensor().use_count() == 2 &&
         argument.toTensor().unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr;
}

// Most often the stack has the last reference of C++ to every tensor, and torch takes the GIL anew
// for each tensor. Where a thread holds the GIL already, taking it costs next to nothing, so the
// function takes it once around all drops.
void drop_arguments(Stack* stack, size_t count) {
  const auto arguments = torch::jit::last(*stack, count);
  if (PyGILState_Release != nullptr && PyGILState_Ensure != nullptr &&
      Py_IsInitialized != nullptr && Py_IsInitialized() != 0 &&
      std::any_of(arguments.begin(), arguments.end(), is_last_of_cpp)) {
    const int state = PyGILState_Ensure();
    torch::jit::drop(*stack, count);
    PyGILState_Release(state);
  } else {
    torch::jit::drop(*stack, count);
  }
}

// This function is part of torch's stable C interface. It is not linked to, but looked up in
// libtorch_cuda.so, which is loaded wherever there is a CUDA tensor, so that one library serves
// builds of torch with CUDA and without.
using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(
                                  dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

// The function returns torch's current stream of a device.
void* current_stream(const Op& op, c10::Device device) {
  void* stream = nullptr;
  if (device.is_cuda()) {
    static const CurrentStream current = find_current_stream();
    TORCH_CHECK(current != nullptr && current(device.index(), &stream) == 0, "mhc::", op.name,
                ": torch has no current stream of CUDA device ", device.index());
  }
  return stream;
}

using Tensors = c10::SmallVector<Tensor, 4>;

union Value {
  void* pointer;
  float float32;
  int32_t int32;
  int64_t int64;
};

void launch(const Op& op, const Step& step, int64_t tokens, c10::ArrayRef<IValue> arguments,
            const Tensors& outputs, const Tensors& memory, void* stream) {
  constexpr size_t kMostParameters = 40;
  std::array<Value, kMostParameters> values;
  std::array<void*, kMostParameters> addresses;
  c10::TensorImpl* fn = nullptr;
  early::Look look;
  const auto address = [](const Tensor& tensor) {
    return const_cast<void*>(tensor.const_data_ptr());
  };
  for (size_t i = 0; i < step.parameters.size(); ++i) {
    const Parameter& parameter = step.parameters[i];
    Value& value = values[i];
    addresses[i] = &value;
    switch (parameter.source) {
      case Parameter::kArgument:
        value.pointer = address(arguments[parameter.index].toTensor());
        break;
      case Parameter::kOutput:
        value.pointer = address(outputs[parameter.index]);
        break;
      case Parameter::kMemory:
        value.pointer = address(memory[parameter.index]);
        break;
      case Parameter::kFloat32:
        value.float32 = static_cast<float>(arguments[parameter.index].toDouble());
        break;
      case Parameter::kInt32:
        value.int32 = static_cast<int32_t>(arguments[parameter.index].toInt());
        break;
      case Parameter::kFormula32:
        value.int32 = static_cast<int32_t>((*parameter.formula)(tokens));
        break;
      case Parameter::kFormula64:
        value.int64 = (*parameter.formula)(tokens);
        break;
      case Parameter::kEarly:
        fn = arguments[parameter.index].toTensor().unsafeGetTensorImpl();
        look = early::look(fn, [&] { return launcher.capture(step.kernel, stream); });
        value.int32 = look.allowed;
        break;
    }
  }
  const auto grid_x = static_cast<unsigned>(step.grid_x(tokens));
  const auto grid_y = static_cast<unsigned>(step.grid_y(tokens));
  const int result = launcher.launch(step.kernel, grid_x, grid_y, stream, addresses.data());
  if (result != 0) {
    std::array<char, 1024> text;
    launcher.explain_launch(step.kernel, grid_x, grid_y, result, text.data(), text.size());
    TORCH_CHECK(false, "mhc::", op.name, ": ", text.data());
  }
  if (look.news) {
    early::add(fn, look.read);
  }
}

// The function replaces the arguments by the outputs, or leaves the arguments and returns false.
bool serve(const Op& op, Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.arguments);
  if (!arguments[op.streams].isTensor()) {
    return false;
  }
  const Tensor& streams = arguments[op.streams].toTensor();
  if (!streams.defined() || streams.dim() < op.streams_tail) {
    return false;
  }
  const c10::Device device = streams.device();
  const Place* const place = op.find(device, streams.size(-1), op.has_norm(arguments));
  const Plan* const plan =
      place == nullptr ? nullptr : place->plan.load(std::memory_order_acquire);
  if (plan == nullptr) {
    return false;
  }
  const IntArrayRef leading = streams.sizes().slice(0, streams.dim() - op.streams_tail);
  for (size_t i = 0; i < op.arguments; ++i) {
    if (!is_served(arguments[i], device, plan->arguments[i], leading)) {
      return false;
    }
  }
  const int64_t tokens = c10::multiply_integers(leading);
  const auto range = std::find_if(
      plan->ranges.begin(), plan->ranges.end(),
      [tokens](const Range& r) { return r.max_tokens < 0 || tokens <= r.max_tokens; });
  if (range == plan->ranges.end() || range->steps.empty()) {
    return false;
  }

  const OnDevice guard(device);
  const Allocation allocation(device);
  Tensors outputs, memory;
  c10::SmallVector<int64_t, 6> sizes;
  for (const Output& output : plan->outputs) {
    sizes.assign(leading.begin(), leading.end());
    sizes.append(output.tail.begin(), output.tail.end());
    outputs.push_back(allocation.empty(sizes, output.dtype));
  }
  for (const Memory& needed : range->memory) {
    sizes.clear();
    for (const Formula& size : needed.shape) {
      sizes.push_back(size(tokens));
    }
    memory.push_back(allocation.empty(sizes, needed.dtype));
  }
  if (tokens > 0) {
    void* const stream = current_stream(op, device);
    for (const Step& step : range->steps) {
      launch(op, step, tokens, arguments, outputs, memory, stream);
    }
  }
  calls.fetch_add(1, std::memory_order_relaxed);

  drop_arguments(stack, op.arguments);
  for (Tensor& output : outputs) {
    stack->emplace_back(std::move(output));
  }
  return true;
}

bool take(const Op& op, DispatchKeySet keys, Stack* stack) {
  return is_plain(keys) && serve(op, stack);
}

bool needs_grad(const Stack& stack, size_t count) {
  if (!c10::GradMode::is_enabled()) {
    return false;
  }
  const auto arguments = torch::jit::last(stack, count);
  return std::any_of(arguments.begin(), arguments.end(), [](const IValue& argument) {
    return argument.isTensor() && argument.toTensor().requires_grad();
  });
}

// The function tells whether an argument carries a tangent of forward-mode differentiation. Without
// a level of such there is none, and asking for the first level costs less than asking tensors.
bool has_tangent(const Stack& stack, size_t count) {
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr) {
    return false;
  }
  const auto arguments = torch::jit::last(stack, count);
  return std::any_of(arguments.begin(), arguments.end(), [](const IValue& argument) {
    return argument.isTensor() && argument.toTensor().defined() &&
           argument.toTensor()._fw_grad(/*level=*/0).defined();
  });
}

template <typename Kernel>
void implement(const Op* op, DispatchKey key) {
  // The library is never destroyed, because its kernels have to stay.
  auto* const library =
      new torch::Library(torch::Library::IMPL, "mhc", key, __FILE__, __LINE__);
  library->impl(op->name.c_str(),
                torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(op)));
}

}  // namespace
