// This header reads plans, which mhc_ops/native/plan.py makes, from numbers.
//
// It is a part of host.cpp, as all headers in this folder are.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/SmallVector.h>

namespace {

// Words reads what mhc_ops/native/host.py writes: one number after another. A plan that was written
// ahead names kernels by number and leaves the multiprocessors of the device open; the reader of
// such a plan knows both.
class Words {
 public:
  using Kernels = std::function<const void*(int64_t)>;

  explicit Words(const int64_t* next) : next_(next) {}
  Words(const int64_t* next, Kernels kernels, int64_t multiprocessors)
      : next_(next), kernels_(std::move(kernels)), multiprocessors_(multiprocessors) {}

  int64_t next() { return *next_++; }
  const void* kernel() {
    const int64_t word = next();
    return kernels_ ? kernels_(word) : reinterpret_cast<const void*>(word);
  }
  int64_t multiprocessors() const { return multiprocessors_; }

 private:
  const int64_t* next_;
  Kernels kernels_;
  int64_t multiprocessors_ = 0;
};

// A Formula computes a number from the token count, by the rules of mhc_ops/formula.py.
class Formula {
 public:
  explicit Formula(Words& words) {
    for (int64_t left = words.next(); left > 0; --left) {
      const int64_t step = words.next();
      if (step == kMultiprocessors) {
        steps_.insert(steps_.end(), {kConstant, words.multiprocessors()});
        continue;
      }
      steps_.push_back(step);
      if (step == kConstant) {
        steps_.push_back(words.next());
        --left;
      }
    }
  }

  int64_t operator()(int64_t tokens) const {
    std::array<int64_t, 32> stack;  // host.py refuses a formula that needs more.
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
    kMultiprocessors,
  };

  std::vector<int64_t> steps_;
};

at::ScalarType next_dtype(Words& words) {
  return words.next() == 0 ? at::kBFloat16 : at::kFloat;
}

// An Argument says what an argument of a call must be.
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
      least = words.next() != 0 ? 0 : -FLT_MAX;
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

// An Output is allocated for each call, with the token dimensions before the tail.
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

// A Memory is allocated for each call, for what one launch leaves to the next.
struct Memory {
  explicit Memory(Words& words) : dtype(next_dtype(words)), shape(next_list<Formula>(words)) {}

  at::ScalarType dtype;
  std::vector<Formula> shape;
};

// A Parameter says where a parameter of a kernel comes from.
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
      : kernel(words.kernel()),
        parameters(next_list<Parameter>(words)),
        grid_x(words),
        grid_y(words) {}

  const void* kernel;
  std::vector<Parameter> parameters;
  Formula grid_x, grid_y;
};

// A Range has the launches that serve a range of token counts, or none where a kernel of one of
// them is not loaded.
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

// A Place holds the plan for a hidden size on a device, with or without the norm. Places are few,
// are only ever added and live as long as the process, as plans do, so that a call finds its place
// without a lock.
struct Place {
  c10::Device device;
  int64_t hidden;
  bool norm;
  Place* next;
  std::atomic<const Plan*> plan{nullptr};
};

constexpr size_t kMostArguments = 24;

// An Op says where calls of an op show which plan they need.
struct Op {
  std::string name;
  size_t arguments;
  size_t streams;          // This argument has the token dimensions.
  int64_t streams_tail;    // So many dimensions of the streams follow the token dimensions.
  int64_t norm_weight;     // This is -1 where there is none.
  std::atomic<Place*> places{nullptr};

  bool has_norm(c10::ArrayRef<c10::IValue> call) const {
    return norm_weight >= 0 && !call[norm_weight].isNone();
  }

  Place* find(c10::Device device, int64_t hidden, bool norm) const {
    Place* place = places.load(std::memory_order_acquire);
    while (place != nullptr &&
           !(place->hidden == hidden && place->norm == norm && place->device == device)) {
      place = place->next;
    }
    return place;
  }
};

std::mutex ops_mutex;  // Whoever adds an op or a plan holds this.
std::atomic<int64_t> calls{0};

// The list is never destroyed, because calls from other threads may outlast the destructors of
// static objects.
std::vector<Op*>& ops() {
  static auto* const list = new std::vector<Op*>();
  return *list;
}

// From now on, calls that the plan can serve follow it.
void remember(Op& op, c10::Device device, int64_t hidden, bool norm, const Plan* plan) {
  const std::lock_guard<std::mutex> lock(ops_mutex);
  Place* place = op.find(device, hidden, norm);
  if (place == nullptr) {
    place = new Place{device, hidden, norm, op.places.load(std::memory_order_relaxed)};
    op.places.store(place, std::memory_order_release);
  }
  place->plan.store(plan, std::memory_order_release);
}

}  // namespace
