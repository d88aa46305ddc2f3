// main() of an emulated kernel: reads the arguments from files, runs the grid, writes the results.
//
//   kernel grid=4,3,1 block=128,1,1 shared=10240 resident=1 pdl=1 ARGUMENT...
//
// with one ARGUMENT a parameter, in order: `name=file` for a pointer to const, `name@file` for a
// pointer whose memory is written back, `name:number` for a value. `name+file` is a pointer to const
// that may be read before cudaGridDependencySynchronize.
#pragma once

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <tuple>

#include "cta.h"

namespace emulation {

struct Argument {
  std::string name, text;
  char kind;
  std::unique_ptr<GuardedMemory> memory;

  explicit Argument(const std::string& word) {
    const size_t split = word.find_first_of("=@+:");
    if (split == std::string::npos) fail("argument %s: no kind", word.c_str());
    name = word.substr(0, split);
    kind = word[split];
    text = word.substr(split + 1);
    if (kind == ':') return;
    std::ifstream file(text, std::ios::binary);
    std::ostringstream content;
    content << file.rdbuf();
    if (!file) fail("cannot read %s", text.c_str());
    memory = std::make_unique<GuardedMemory>(content.str().size());
    std::memcpy(memory->data(), content.str().data(), memory->size());
  }

  // The parameter of type P that this argument is for.
  template <class P>
  P as() const {
    if constexpr (std::is_pointer_v<P>) {
      constexpr bool is_const = std::is_const_v<std::remove_pointer_t<P>>;
      if (!memory || is_const != (kind != '@'))
        fail("%s: the kernel takes a pointer to %s memory", name.c_str(), is_const ? "const" : "writable");
      return reinterpret_cast<P>(memory->data());
    } else {
      if (memory) fail("%s: the kernel takes a value", name.c_str());
      if constexpr (std::is_floating_point_v<P>) return P(std::strtod(text.c_str(), nullptr));
      return P(std::strtoll(text.c_str(), nullptr, 0));
    }
  }

  void protect(bool open) const {
    if (memory)
      memory->protect(!open && kind != '+' ? PROT_NONE
                      : kind == '@'        ? PROT_READ | PROT_WRITE
                                           : PROT_READ);
  }

  void write_back() const {
    if (!memory) return;
    memory->protect(PROT_READ | PROT_WRITE);
    if (!memory->intact()) fail("%s: a write out of bounds", name.c_str());
    if (kind != '@') return;
    std::ofstream file(text, std::ios::binary);
    file.write(reinterpret_cast<const char*>(memory->data()), memory->size());
    if (!file) fail("cannot write %s", text.c_str());
  }
};

inline std::vector<Argument> arguments;

// Says which buffer a forbidden access was meant for.
inline void on_fault(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  for (const Argument& argument : arguments) {
    if (!argument.memory || !argument.memory->guards(address)) continue;
    const char* name = argument.name.c_str();
    const long offset = address - argument.memory->data();
    if (!argument.memory->holds(address))
      fail("%s: access out of bounds, byte %ld of %zu", name, offset, argument.memory->size());
    if (!dependency.open)
      fail("%s: touched before cudaGridDependencySynchronize, byte %ld", name, offset);
    fail("%s: write to const memory, byte %ld", name, offset);
  }
  const Thread* thread = self();
  if (thread && thread->cta->dynamic_shared.guards(address))
    fail("shared memory: access out of bounds, byte %ld of %zu",
         long(address - thread->cta->dynamic_shared.data()), thread->cta->dynamic_shared.size());
  fail("access to address %p, which is in no buffer", info->si_addr);
}

inline void catch_faults() {
  static unsigned char stack[64 * 1024];  // a fiber that overflows its stack has none left
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  if (sigaltstack(&alternative, nullptr) != 0 || sigaction(SIGSEGV, &action, nullptr) != 0 ||
      sigaction(SIGBUS, &action, nullptr) != 0)
    fail("cannot catch faults");
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), const Grid& grid, bool close_global, std::index_sequence<I...>) {
  const std::tuple<P...> values{arguments[I].as<P>()...};
  run(grid, [&] { std::apply(kernel, values); }, close_global);
}

inline Dim3 parse_dim3(const std::string& text) {
  Dim3 dim;
  if (std::sscanf(text.c_str(), "%u,%u,%u", &dim.x, &dim.y, &dim.z) != 3)
    fail("%s: expected three numbers", text.c_str());
  return dim;
}

template <class... P>
int launch(int count, char** words, void (*kernel)(P...)) {
  constexpr int OPTIONS = 5;
  if (count != 1 + OPTIONS + int(sizeof...(P)))
    fail("the kernel takes %zu arguments, got %d", sizeof...(P), count - 1 - OPTIONS);
  const auto option = [&](int i) { return std::string(std::strchr(words[i], '=') + 1); };
  Grid grid;
  grid.ctas = parse_dim3(option(1));
  grid.threads = parse_dim3(option(2));
  grid.dynamic_shared = std::stoul(option(3));
  grid.resident = std::stoul(option(4));
  const bool close_global = option(5) == "1";
  for (int i = 1 + OPTIONS; i < count; ++i) arguments.emplace_back(words[i]);
  for (const Argument& argument : arguments) argument.protect(true);
  dependency.set = [](bool open) {
    for (const Argument& argument : arguments) argument.protect(open);
  };
  catch_faults();
  call(kernel, grid, close_global, std::index_sequence_for<P...>());
  for (const Argument& argument : arguments) argument.write_back();
  return 0;
}

}  // namespace emulation
