// This header serves the ops in a process without Python, such as a program that runs a package of
// AOTInductor.
//
// What Python knows about ops and plans, mhc_ops/native/ahead.py has written into the folder of the
// kernels. From that folder the ops are defined, and the first call on a device with a hidden size
// reads the plan and loads its kernels through the launcher that lies beside the kernels. From then
// on such calls take the short way. There is no long way: a call that no plan serves is an error
// that says what was expected. Strides and alignment alone are put right first, by a copy, as on
// the long way.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/hash.h>
#include <torch/library.h>

#include "call.h"
#include "plan.h"

#ifndef MHC_SOURCE  // This is the digest of these sources that stands in files written ahead.
#error "MHC_SOURCE is not defined: mhc_ops/native/host.py builds this file"
#endif

namespace {
namespace standalone {

constexpr const char* kBuild = "; build the folder with python -m mhc_ops build";

std::atomic<bool> cpu_is_device{false};  // Tests set this.

// These functions of the launcher are used before there is a kernel.
struct {
  int (*open)(const char* driver);
  int (*describe)(int device, int* facts);
  int (*load)(int device, const void* cubin, const char* symbol, const char* name, unsigned block,
              unsigned cluster, unsigned shared, int pdl, const void** kernel);
  void (*explain)(int result, char* text, size_t size);
} loader;

std::mutex mutex;  // Whoever loads, or touches anything below, holds this.
std::string& folder() {
  static auto* const path = new std::string();
  return *path;
}

struct Device {
  std::string arch;
  int64_t multiprocessors;
  std::map<std::string, const void*> kernels;  // These are loaded, by name.
};

std::string explain(int result) {
  std::array<char, 512> text;
  loader.explain(result, text.data(), text.size());
  return text.data();
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "mhc: there is no ", path, kBuild);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

// The function reads a file of ahead.py without its first line. That line has the digest of the
// sources that wrote the file and the SHA-1 of the rest.
std::istringstream read_sealed(const std::string& path) {
  const std::string content = read(path);
  const size_t end = content.find('\n');
  std::istringstream seal(content.substr(0, end));
  std::string source, sha1;
  seal >> source >> sha1;
  TORCH_CHECK(source == MHC_SOURCE, "mhc: ", path, " is of another version of mhc_ops (", source,
              ", expected ", MHC_SOURCE, "); build the folder again, with this one");
  const std::string body = end == std::string::npos ? "" : content.substr(end + 1);
  TORCH_CHECK(c10::sha1(body).str() == sha1, "mhc: ", path, " is truncated or changed", kBuild);
  return std::istringstream(body);
}

// A Kernel has what the launcher is told of a kernel, from one line of a file of plans.
struct Kernel {
  explicit Kernel(std::istringstream& line) {
    line >> name >> symbol >> block >> cluster >> shared >> pdl >> sha1;
  }

  const void* load(int ordinal) const {
    const std::string cubin = read(folder() + "/" + name + ".cubin");
    TORCH_CHECK(c10::sha1(cubin).str() == sha1, "mhc: ", folder(), "/", name,
                ".cubin is not the one that the plans were written for", kBuild);
    const void* kernel = nullptr;
    const int result = loader.load(ordinal, cubin.data(), symbol.c_str(), name.c_str(), block,
                                   cluster, shared, pdl, &kernel);
    TORCH_CHECK(result == 0, "mhc: ", name, " cannot be loaded on device ", ordinal, ": ",
                explain(result));
    return kernel;
  }

  std::string name, symbol, sha1;
  unsigned block = 0, cluster = 0, shared = 0;
  int pdl = 0;
};

Device& device_of(int ordinal) {
  static auto* const devices = new std::map<int, Device>();
  const auto found = devices->find(ordinal);
  if (found != devices->end()) {
    return found->second;
  }
  int result = loader.open("libcuda.so.1");
  std::array<int, 3> facts{};
  if (result == 0) {
    result = loader.describe(ordinal, facts.data());
  }
  TORCH_CHECK(result == 0, "mhc: device ", ordinal, " cannot be used: ", explain(result));
  const auto [major, minor, multiprocessors] = facts;
  std::ostringstream arch;
  arch << "sm_" << major << minor << (major >= 9 ? "a" : "");
  return devices->emplace(ordinal, Device{arch.str(), multiprocessors, {}}).first->second;
}

// The function reads the plan for a hidden size and loads the plan's kernels, once.
const Plan& plan_of(Op& op, c10::Device device, int64_t hidden, bool norm) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Place* const place = op.find(device, hidden, norm);
  if (place != nullptr && place->plan.load() != nullptr) {
    return *place->plan.load();
  }
  const int ordinal = std::max<int>(device.index(), 0);
  Device& on = device_of(ordinal);
  TORCH_CHECK(launcher.capture(nullptr, current_stream(op, device)) == 0, "mhc::", op.name,
              ": its kernels for hidden size ", hidden, " are not loaded on ", device,
              " and cannot be during the capture of a CUDA graph; call it once before the capture");
  const std::string path =
      folder() + "/plans-" + on.arch + "-" + std::to_string(hidden) + ".txt";
  std::istringstream file = read_sealed(path);
  std::vector<Kernel> kernels;
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string kind, name;
    line >> kind;
    if (kind == "kernel") {
      kernels.emplace_back(line);
      continue;
    }
    bool with_norm = false;
    line >> name >> with_norm;
    if (name != op.name || with_norm != norm) {
      continue;
    }
    std::vector<int64_t> words;
    for (int64_t word = 0; line >> word;) {
      words.push_back(word);
    }
    const auto loaded = [&](int64_t number) {
      const Kernel& kernel = kernels.at(number);
      const void*& handle = on.kernels[kernel.name];
      if (handle == nullptr) {
        handle = kernel.load(ordinal);
      }
      return handle;
    };
    Words reader(words.data(), loaded, on.multiprocessors);
    const auto* const plan = new Plan(reader);
    remember(op, device, hidden, norm, plan);
    return *plan;
  }
  TORCH_CHECK(false, "mhc::", op.name, ": there is no plan of it in ", path, kBuild);
}

// The function makes each tensor one that the kernels can read: dense, aligned, and norm_weight in
// the dtype of the plan.
void make_dense(const Op& op, const Plan& plan, Stack* stack) {
  const size_t first = stack->size() - op.arguments;
  for (size_t i = 0; i < op.arguments; ++i) {
    IValue& given = (*stack)[first + i];
    const Argument& wanted = plan.arguments[i];
    if (wanted.kind != Argument::kTensor || !given.isTensor() || !given.toTensor().defined()) {
      continue;
    }
    Tensor dense = given.toTensor();
    if (static_cast<int64_t>(i) == op.norm_weight && dense.scalar_type() == at::kFloat) {
      dense = dense.to(wanted.dtype);
    }
    dense = dense.contiguous();
    if (wanted.rows &&
        reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % kAlignment != 0) {
      dense = dense.clone();
    }
    given = std::move(dense);
  }
}

std::string describe(const IValue& given) {
  std::ostringstream text;
  if (given.isTensor() && given.toTensor().defined()) {
    const Tensor& tensor = given.toTensor();
    text << tensor.scalar_type() << " " << tensor.sizes() << " on " << tensor.device();
  } else if (given.isDouble()) {
    text << given.toDouble();
  } else if (given.isInt()) {
    text << given.toInt();
  } else {
    text << given.tagKind();
  }
  return text.str();
}

std::string describe(const Argument& wanted, IntArrayRef leading, c10::Device device) {
  std::ostringstream text;
  switch (wanted.kind) {
    case Argument::kTensor: {
      std::vector<int64_t> sizes;
      if (wanted.per_token) {
        sizes.assign(leading.begin(), leading.end());
      }
      sizes.insert(sizes.end(), wanted.tail.begin(), wanted.tail.end());
      text << wanted.dtype << " " << IntArrayRef(sizes) << " on " << device;
      break;
    }
    case Argument::kFloat:
      text << "a number that fp32 holds" << (wanted.least == 0 ? ", at least 0" : "");
      break;
    case Argument::kInt:
      text << "an integer from " << wanted.first << " to " << wanted.last;
      break;
    default:
      text << "None, as there is no norm_weight";
  }
  return text.str();
}

// The function says why the plan does not serve a call.
[[noreturn]] void refuse(const Op& op, const Plan& plan, const c10::FunctionSchema& schema,
                         c10::ArrayRef<IValue> arguments) {
  const Tensor& streams = arguments[op.streams].toTensor();
  const IntArrayRef leading = streams.sizes().slice(0, streams.dim() - op.streams_tail);
  for (size_t i = 0; i < op.arguments; ++i) {
    TORCH_CHECK(is_served(arguments[i], streams.device(), plan.arguments[i], leading), "mhc::",
                op.name, ": expected ", schema.arguments()[i].name(), " as ",
                describe(plan.arguments[i], leading, streams.device()), ", got ",
                describe(arguments[i]));
  }
  TORCH_CHECK(false, "mhc::", op.name, ": there are no kernels for ",
              c10::multiply_integers(leading), " tokens in ", folder(), kBuild,
              " and a larger --max-tokens");
}

// Backend is the kernel of a backend, which gets the calls that the short way has not taken.
struct Backend final : c10::OperatorKernel {
  explicit Backend(const Op* op) : op_(const_cast<Op*>(op)) {}
  void operator()(const c10::OperatorHandle& handle, DispatchKeySet, Stack* stack) {
    const IValue& given = torch::jit::last(*stack, op_->arguments)[op_->streams];
    TORCH_CHECK(given.isTensor() && given.toTensor().dim() >= op_->streams_tail, "mhc::", op_->name,
                ": expected ", handle.schema().arguments()[op_->streams].name(),
                " with at least ", op_->streams_tail, " dimensions, got ", describe(given));
    const Tensor streams = given.toTensor();
    const c10::Device device = streams.device();
    TORCH_CHECK(device.is_cuda() || cpu_is_device, "mhc::", op_->name,
                ": expected tensors on a CUDA device, got ", device,
                "; without Python there are no kernels for it");
    const OnDevice guard(device);
    const bool norm = op_->has_norm(torch::jit::last(*stack, op_->arguments));
    const Plan& plan = plan_of(*op_, device, streams.size(-1), norm);
    make_dense(*op_, plan, stack);
    if (!serve(*op_, stack)) {
      refuse(*op_, plan, handle.schema(), torch::jit::last(*stack, op_->arguments));
    }
  }

 private:
  Op* op_;
};

// ForwardOnly is the kernel of all autograd keys.
struct ForwardOnly final : c10::OperatorKernel {
  explicit ForwardOnly(const Op* op) : op_(op) {}
  void operator()(const c10::OperatorHandle& handle, DispatchKeySet keys, Stack* stack) {
    TORCH_CHECK(!needs_grad(*stack, op_->arguments), "mhc::", op_->name,
                ": forward only: this op has no backward yet; call it under torch::NoGradGuard or "
                "c10::InferenceMode, or detach its inputs");
    TORCH_CHECK(!has_tangent(*stack, op_->arguments), "mhc::", op_->name,
                ": this op has no forward-mode derivative; detach its inputs");
    handle.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }

 private:
  const Op* op_;
};

void register_kernels(const Op* op) {
  implement<Backend>(op, DispatchKey::CPU);
  implement<Backend>(op, DispatchKey::CUDA);
  implement<ForwardOnly>(op, DispatchKey::Autograd);
}

// The function returns the folder of this library.
std::string own_folder() {
  Dl_info found{};
  TORCH_CHECK(dladdr(reinterpret_cast<const void*>(&own_folder), &found) != 0,
              "mhc: the system does not tell where this library lies");
  const std::string path = found.dli_fname;
  const size_t end = path.rfind('/');
  return end == std::string::npos ? "." : path.substr(0, end);
}

template <typename Function>
void find(void* library, const char* name, Function& place) {
  place = reinterpret_cast<Function>(dlsym(library, name));
  TORCH_CHECK(place != nullptr, "mhc: the launcher has no ", name, kBuild);
}

void open_launcher(const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "mhc: the launcher cannot be loaded: ", dlerror(), kBuild);
  find(library, "mhc_open", loader.open);
  find(library, "mhc_describe", loader.describe);
  find(library, "mhc_load", loader.load);
  find(library, "mhc_explain", loader.explain);
  find(library, "mhc_launch", launcher.launch);
  find(library, "mhc_capture", launcher.capture);
  find(library, "mhc_explain_launch", launcher.explain_launch);
}

// The function defines the ops and returns those that are new.
std::vector<const Op*> open(const char* given) {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string path = given == nullptr ? own_folder() : given;
  if (path == folder()) {
    return {};
  }
  TORCH_CHECK(folder().empty(), "mhc: the ops are served from ", folder(), " already");
  std::istringstream file = read_sealed(path + "/ops.txt");
  std::vector<std::pair<Op*, std::string>> found;
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    auto* const op = new Op{};
    line >> op->name >> op->arguments >> op->streams >> op->streams_tail >> op->norm_weight;
    std::string schema;
    std::getline(line >> std::ws, schema);
    TORCH_CHECK(op->arguments <= kMostArguments, "mhc::", op->name, " has too many arguments");
    TORCH_CHECK(!c10::Dispatcher::singleton().findSchema({"mhc::" + op->name, ""}), "mhc::",
                op->name, " is defined already: mhc_ops is imported in Python, which serves it");
    found.emplace_back(op, schema);
  }
  open_launcher(path + "/launcher.so");
  // The library is never destroyed, because its definitions have to stay.
  auto* const library =
      new torch::Library(torch::Library::FRAGMENT, "mhc", std::nullopt, __FILE__, __LINE__);
  std::vector<const Op*> defined;
  for (const auto& [op, schema] : found) {
    library->def(torch::schema(schema.c_str()));
    defined.push_back(op);
  }
  folder() = path;
  return defined;
}

}  // namespace standalone
}  // namespace
