// The runtime of an emulated kernel: it reads the arguments from files, runs the grid and writes the
// results.
//
//   kernel grid=4,3,1 block=128,1,1 shared=10240 resident=1 pdl=1 ARGUMENT...
//
// with one ARGUMENT a parameter, in order: `name=file` for a pointer to const, `name@file` for a
// pointer whose memory is written back, `name:number` for a value. `name+file` is a pointer to const
// that may be read before cudaGridDependencySynchronize.
#include <bit>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <unistd.h>

#include "cta.h"

namespace emulation {

constexpr int FAILURE = 3;  // exit status of everything that the emulation refuses

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulation: ", stderr);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (running != nullptr) {
    const Dim3 &t = running->index, &c = running->cta_index;
    std::fprintf(stderr, " [thread (%u, %u, %u) of CTA (%u, %u, %u)]", t.x, t.y, t.z, c.x, c.y, c.z);
  }
  std::fputc('\n', stderr);
  std::fflush(stderr);
  _exit(FAILURE);
}

// --- what kernels call

const Dim3& threads_of_cta() { return running->cta->grid.threads; }
const Dim3& ctas_of_grid() { return running->cta->grid.ctas; }

void* dynamic_shared() { return running->cta->dynamic_shared.data(); }

void* static_shared(const void* declaration, size_t bytes) {
  Unobserved bookkeeping;
  Cta& cta = *running->cta;
  cta.lock.lock();
  void* data = cta.static_shared.try_emplace(declaration, bytes).first->second.data();
  cta.lock.unlock();
  return data;
}

void wait_at_barrier(unsigned barrier, unsigned threads) {
  Cta& cta = *running->cta;
  cta.barriers.at(barrier).wait(threads ? threads : cta.grid.threads.count(), "barrier", barrier);
}

void arrive_at_barrier(unsigned barrier, unsigned threads) {
  running->cta->barriers.at(barrier).arrive(threads, "barrier", barrier);
}

// The barrier or exchange of a warp's lanes in `mask`.
template <class T>
static T& of_mask(std::map<unsigned, T> Warp::* of_masks, unsigned mask) {
  Unobserved bookkeeping;
  if (!(mask >> running->lane() & 1)) fail("lane %u is not in the mask %#x", running->lane(), mask);
  Warp& warp = running->cta->warps[running->warp()];
  warp.lock.lock();
  T& shared = (warp.*of_masks)[mask];
  warp.lock.unlock();
  return shared;
}

void wait_for_warp(unsigned mask) {
  of_mask(&Warp::syncs, mask).wait(std::popcount(mask), "__syncwarp of warp", running->warp());
}

void exchange(unsigned mask, const void* value, size_t bytes, void* values) {
  if (bytes > Exchange::SLOT) fail("an exchange of %zu bytes a lane", bytes);
  Unobserved exchange_of_registers;
  Exchange& exchange = of_mask(&Warp::exchanges, mask);
  const unsigned lane = running->lane();
  auto& slots = exchange.slots[exchange.round[lane]++ % 2];
  std::memcpy(slots[lane], value, bytes);
  exchange.all.wait(std::popcount(mask), "exchange of warp", running->warp());
  for (unsigned other = 0; other < WARP; ++other)
    std::memcpy(static_cast<unsigned char*>(values) + other * bytes, slots[other], bytes);
}

void wait_for_dependency() { dependency.wait(); }

// --- arguments and launch

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

static std::vector<Argument> arguments;

void* pointer_argument(unsigned i, bool is_const) {
  const Argument& argument = arguments[i];
  if (!argument.memory || is_const != (argument.kind != '@'))
    fail("%s: the kernel takes a pointer to %s memory", argument.name.c_str(),
         is_const ? "const" : "writable");
  return argument.memory->data();
}

static const char* number(unsigned i) {
  if (arguments[i].memory) fail("%s: the kernel takes a number", arguments[i].name.c_str());
  return arguments[i].text.c_str();
}
double floating_argument(unsigned i) { return std::strtod(number(i), nullptr); }
long long integer_argument(unsigned i) { return std::strtoll(number(i), nullptr, 0); }

// Says which buffer a forbidden access was meant for.
static void on_fault(int, siginfo_t* info, void*) {
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
  if (running != nullptr && running->cta->dynamic_shared.guards(address))
    fail("shared memory: access out of bounds, byte %ld of %zu",
         long(address - running->cta->dynamic_shared.data()), running->cta->dynamic_shared.size());
  fail("access to address %p, which is in no buffer", info->si_addr);
}

static void catch_faults() {
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

static Dim3 parse_dim3(const std::string& text) {
  Dim3 dim;
  if (std::sscanf(text.c_str(), "%u,%u,%u", &dim.x, &dim.y, &dim.z) != 3)
    fail("%s: expected three numbers", text.c_str());
  return dim;
}

int launch(int count, char** words, unsigned parameters, void (*kernel)()) {
  constexpr int OPTIONS = 5;
  if (count != 1 + OPTIONS + int(parameters))
    fail("the kernel takes %u arguments, got %d", parameters, count - 1 - OPTIONS);
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
  run(grid, kernel, close_global);
  for (const Argument& argument : arguments) argument.write_back();
  return 0;
}

}  // namespace emulation
