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
// file, and describes ops and plans to it.

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

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
#include <torch/library.h>

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
using c10::IValue;
using torch::jit::Stack;

constexpr uintptr_t kAlignment = 16;  // bytes: the kernels load and store 16 bytes a thread

// The launcher's functions, launcher.c.
struct Launcher {
  int (*launch)(const void* kernel, unsigned grid_x, unsigned grid_y, void* stream,
                void** arguments);
  uint64_t (*capture)(const void* kernel, void* stream);
  void (*explain_launch)(const void* kernel, unsigned grid_x, unsigned grid_y, int result,
                         char* text, size_t size);
} launcher;

// ------------------------------------------------------------------------------------------ plans

// What mhc_ops/native/host.py writes: one number after another.
class Words {
 public:
  explicit Words(const int64_t* next) : next_(next) {}
  int64_t next() { return *next_++; }

 private:
  const int64_t* next_;
};

// A formula of the token count, mhc_ops/formula.py.
class Formula {
 public:
  explicit Formula(Words& words) : steps_(words.next()) {
    for (int64_t& step : steps_) {
      step = words.next();
    }
  }

  int64_t operator()(int64_t tokens) const {
    std::array<int64_t, 32> stack;  // host.py refuses a formula that needs more
    int64_t* top = stack.data() - 1;
    for (size_t i = 0; i < steps_.size(); ++i) {
      switch (static_cast<Step>(steps_[i])) {
        case kConstant: *++top = steps_[++i]; continue;
        case kTokens: *++top = tokens; continue;
        case kSelect: top -= 2; *top = *top != 0 ? top[1] : top[2]; continue;
        default: --top;
      }
      switch (static_cast<Step>(steps_[i])) {
        case kAdd: *top += top[1]; break;
        case kSubtract: *top -= top[1]; break;
        case kMultiply: *top *= top[1]; break;
        case kDivide: *top /= top[1]; break;
        case kRemainder: *top %= top[1]; break;
        case kMinimum: *top = std::min(*top, top[1]); break;
        case kMaximum: *top = std::max(*top, top[1]); break;
        default: *top = *top <= top[1]; break;
      }
    }
    return *top;
  }

 private:
  enum Step : int64_t {
    kConstant,
    kTokens,
    kAdd,
    kSubtract,
    kMultiply,
    kDivide,
    kRemainder,
    kMinimum,
    kMaximum,
    kAtMost,
    kSelect,
  };

  std::vector<int64_t> steps_;
};

at::ScalarType next_dtype(Words& words) {
  return words.next() == 0 ? at::kBFloat16 : at::kFloat;
}

// What an argument must be.
struct Argument {
  enum Kind : int64_t { kTensor, kFloat, kInt, kNone };

  explicit Argument(Words& words) : kind(static_cast<Kind>(words.next())) {
    if (kind == kTensor) {
      dtype = next_dtype(words);
      per_token = words.next() != 0;
      rows = words.next() != 0;
      may_drop_last = words.next() != 0;
      tail.resize(words.next());
      for (int64_t& size : tail) {
        size = words.next();
      }
    } else if (kind == kFloat) {
      least = words.next() != 0 ? 0 : -DBL_MAX;
    } else if (kind == kInt) {
      first = words.next();
      last = words.next();
    }
  }

  Kind kind;
  at::ScalarType dtype = at::kFloat;
  bool per_token = false, rows = false, may_drop_last = false;
  c10::SmallVector<int64_t, 2> tail;
  double least = 0;
  int64_t first = 0, last = 0;
};

// What is allocated for a call: an output, with the token dimensions before its tail.
struct Output {
  explicit Output(Words& words) : dtype(next_dtype(words)), tail(words.next()) {
    for (int64_t& size : tail) {
      size = words.next();
    }
  }

  at::ScalarType dtype;
  c10::SmallVector<int64_t, 2> tail;
};

template <typename T>
std::vector<T> next_list(Words& words) {
  std::vector<T> list;
  const int64_t size = words.next();
  list.reserve(size);
  for (int64_t i = 0; i < size; ++i) {
    list.emplace_back(words);
  }
  return list;
}

// Memory between the launches of a call.
struct Memory {
  explicit Memory(Words& words) : dtype(next_dtype(words)), shape(next_list<Formula>(words)) {}

  at::ScalarType dtype;
  std::vector<Formula> shape;
};

// Where a parameter of a kernel comes from.
struct Parameter {
  enum Source : int64_t { kArgument, kOutput, kMemory, kFloat32, kInt32, kFormula32, kFormula64,
                          kEarly };

  explicit Parameter(Words& words) : source(static_cast<Source>(words.next())) {
    if (source == kFormula32 || source == kFormula64) {
      formula.emplace(words);
    } else {
      index = words.next();
    }
  }

  Source source;
  int64_t index = 0;
  std::optional<Formula> formula;
};

struct Step {
  explicit Step(Words& words)
      : kernel(reinterpret_cast<const void*>(words.next())),
        parameters(next_list<Parameter>(words)),
        grid_x(words),
        grid_y(words) {}

  const void* kernel;
  std::vector<Parameter> parameters;
  Formula grid_x, grid_y;
};

// The launches that serve a range of token counts; none where a kernel of them is not loaded.
struct Range {
  explicit Range(Words& words)
      : max_tokens(words.next()),
        memory(next_list<Memory>(words)),
        steps(next_list<Step>(words)) {}

  int64_t max_tokens;
  std::vector<Memory> memory;
  std::vector<Step> steps;
};

struct Plan {
  explicit Plan(Words& words)
      : arguments(next_list<Argument>(words)),
        outputs(next_list<Output>(words)),
        ranges(next_list<Range>(words)) {}

  std::vector<Argument> arguments;
  std::vector<Output> outputs;
  std::vector<Range> ranges;
};

// The place of the plan for a hidden size on a device, with or without the norm. Places are few,
// are only ever added and live as long as the process, as plans do, so that a call finds its own
// without a lock.
struct Place {
  c10::Device device;
  int64_t hidden;
  bool norm;
  Place* next;
  std::atomic<const Plan*> plan{nullptr};
};

constexpr size_t kMostArguments = 24;

// An op, and where its calls show which plan they need.
struct Op {
  std::string name;
  size_t arguments;
  size_t streams;          // the argument that has the token dimensions
  int64_t streams_tail;    // its dimensions behind them
  int64_t norm_weight;     // -1 where there is none
  std::atomic<Place*> places{nullptr};

  Place* find(c10::Device device, int64_t hidden, bool norm) const {
    Place* place = places.load(std::memory_order_acquire);
    while (place != nullptr &&
           !(place->hidden == hidden && place->norm == norm && place->device == device)) {
      place = place->next;
    }
    return place;
  }
};

std::mutex ops_mutex;  // of those who add an op or a plan
std::atomic<int64_t> calls{0};

// never destroyed: calls from other threads may outlast the destructors of static objects
std::vector<Op*>& ops() {
  static auto* const list = new std::vector<Op*>();
  return *list;
}

// ---------------------------------------------------------------------------------- early reading

// The rules: mhc_ops/native/early.py.
namespace early {

// What a call reads. The weak reference of the table keeps the tensor's address from being given to
// another tensor as long as the entry stands, not the tensor's memory from being freed.
struct Read {
  uint32_t version;  // of the content, before the launch
  const void* data;  // assigning to .data changes it and leaves the version
  uint64_t capture;  // that the call is in; 0 for none
};

struct Look {
  bool allowed = false;
  bool news = false;  // whether the read is to be added once its launch has succeeded
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
  std::optional<uint64_t> same;  // the capture of an earlier read of the same
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = table().find(fn);
    if (found != table().end() && found->second.read.version == result.read.version &&
        found->second.read.data == result.read.data) {
      same = found->second.read.capture;
    }
  }
  if (same != 0) {  // no earlier read, or one in a capture
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
  // tensors die without notice: whenever the table has doubled, the dead leave it
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

// --------------------------------------------------------------------------------------- the call

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

// As nearly every call brings it: a contiguous tensor of the right kind, a number in its range.
bool is_served(const IValue& given, c10::Device device, const Argument& wanted,
               IntArrayRef leading) {
  switch (wanted.kind) {
    case Argument::kTensor:
      return given.isTensor() && is_dense(given.toTensor(), device, wanted, leading);
    case Argument::kFloat:
      return given.isDouble() && given.toDouble() >= wanted.least && given.toDouble() <= DBL_MAX;
    case Argument::kInt:
      return given.isInt() && given.toInt() >= wanted.first && given.toInt() <= wanted.last;
    default:
      return given.isNone();
  }
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
bool is_last_of_cpp(const IValue& argument) {
  return argument.isTensor() && argument.toTensor().use_count() == 2 &&
         argument.toTensor().unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr;
}

// Most often all tensors are such, and torch takes the GIL anew for each. Where it is held, that is
// next to nothing, so it is taken once around all of them.
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

// Part of torch's stable C interface. It is looked up in the libtorch_cuda.so that is loaded where
// there is a CUDA tensor, not linked to, so that one library serves builds of torch with CUDA and
// without.
using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(
                                  dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

// torch's current stream of the device.
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

// Replaces the arguments by the outputs, or leaves them and returns false.
bool take(const Op& op, DispatchKeySet keys, Stack* stack) {
  if (!is_plain(keys)) {
    return false;
  }
  const auto arguments = torch::jit::last(*stack, op.arguments);
  if (!arguments[op.streams].isTensor()) {
    return false;
  }
  const Tensor& streams = arguments[op.streams].toTensor();
  if (!streams.defined() || streams.dim() <= op.streams_tail) {
    return false;
  }
  const c10::Device device = streams.device();
  const bool norm = op.norm_weight >= 0 && !arguments[op.norm_weight].isNone();
  const Place* const place = op.find(device, streams.size(-1), norm);
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
  if (tokens < 1) {
    return false;
  }
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
  void* const stream = current_stream(op, device);
  for (const Step& step : range->steps) {
    launch(op, step, tokens, arguments, outputs, memory, stream);
  }
  calls.fetch_add(1, std::memory_order_relaxed);

  drop_arguments(stack, op.arguments);
  for (Tensor& output : outputs) {
    stack->emplace_back(std::move(output));
  }
  return true;
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

// The key set that a kernel is given may hold the kernel's own key and those above it: under the
// Python dispatcher (tracing with symbolic sizes) it does.

struct Autograd final : c10::OperatorKernel {
  explicit Autograd(const Op* op) : op_(op) {}
  void operator()(const c10::OperatorHandle& handle, DispatchKeySet keys, Stack* stack) {
    const DispatchKeySet below = keys & c10::after_autograd_keyset;
    if (needs_grad(*stack, op_->arguments) || !take(*op_, below, stack)) {
      // the Python kernel of all autograd keys still serves those that have none of their own here
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

template <typename Kernel>
void put_in_front(const Op* op, DispatchKey key) {
  // never destroyed, as its kernels are to stay
  auto* const library =
      new torch::Library(torch::Library::IMPL, "mhc", key, __FILE__, __LINE__);
  library->impl(op->name.c_str(),
                torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(op)));
}

}  // namespace

// ----------------------------------------------------------------- what mhc_ops/native/host.py calls

#define MHC_EXPORT extern "C" __attribute__((visibility("default")))

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
  // A CPU has no kernel, so no plan either, but in tests, which give it one to see the arguments.
  put_in_front<Autograd>(op, DispatchKey::AutogradCPU);
  put_in_front<Autograd>(op, DispatchKey::AutogradCUDA);
  put_in_front<BackendSelect>(op, DispatchKey::BackendSelect);
  return static_cast<int64_t>(ops().size()) - 1;
}

// From now on, calls that this plan can serve take the short way.
MHC_EXPORT void mhc_remember(int64_t op, int32_t cuda, int32_t device_index, int64_t hidden,
                             int32_t norm, const int64_t* words) {
  Words reader(words);
  const auto* const plan = new Plan(reader);
  const c10::Device device(cuda != 0 ? c10::kCUDA : c10::kCPU,
                           static_cast<c10::DeviceIndex>(device_index));
  const std::lock_guard<std::mutex> lock(ops_mutex);
  Op* const of = ops()[op];
  Place* place = of->find(device, hidden, norm != 0);
  if (place == nullptr) {
    place = new Place{device, hidden, norm != 0, of->places.load(std::memory_order_relaxed)};
    of->places.store(place, std::memory_order_release);
  }
  place->plan.store(plan, std::memory_order_release);
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
