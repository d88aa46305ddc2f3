// This is the runtime of an emulated kernel: it reads the arguments from files, runs the grid and
// writes the results. A command line is:
//
//   kernel grid=4,3,1 block=128,1,1 shared=10240 cluster=1 resident=1 pdl=1 patience=60 ARGUMENT...
//
// There is one ARGUMENT a parameter, in order: `name=file` is a pointer to const, `name@file` a
// pointer whose memory is written back, `name:number` a value. `name+file` is a pointer to const
// that may be read before cudaGridDependencySynchronize.
#include <algorithm>
#include <atomic>
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

constexpr int FAILURE = 3;  // Everything that the emulation refuses has this exit status.

void fail(const char* format, ...) {
  // One thread speaks and ends the process; others that fail meanwhile must not.
  static std::atomic_flag taken = ATOMIC_FLAG_INIT;
  while (taken.test_and_set(std::memory_order_relaxed)) pause();
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
  return running->cta->static_array(declaration, bytes).data();
}

// No thread reads or writes the member of another.
static Member& member() { return running->cta->members[running->linear]; }

// After a wait of any kind this thread may see what others did, which no earlier bulk_fence covers.
static void waited() { member().fenced = false; }

void wait_at_barrier(unsigned barrier, unsigned threads) {
  Cta& cta = *running->cta;
  cta.barriers.at(barrier).wait(threads ? threads : cta.grid.threads.count(), "barrier", barrier);
  waited();
}

void arrive_at_barrier(unsigned barrier, unsigned threads) {
  running->cta->barriers.at(barrier).arrive(threads, "barrier", barrier);
}

// The function returns the barrier or exchange of a warp's lanes in `mask`.
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
  waited();
}

void exchange(unsigned mask, const void* value, size_t bytes, void* values) {
  if (bytes > Exchange::SLOT) fail("an exchange of %zu bytes a lane", bytes);
  Unobserved exchange_of_registers;
  Exchange& exchange = of_mask(&Warp::exchanges, mask);
  const unsigned lane = running->lane();
  auto& slots = exchange.slots[exchange.round[lane]++ % 2];
  std::memcpy(slots[lane], value, bytes);
  exchange.all.wait(std::popcount(mask), "exchange of warp", running->warp(), false);
  for (unsigned other = 0; other < WARP; ++other)
    std::memcpy(static_cast<unsigned char*>(values) + other * bytes, slots[other], bytes);
}

unsigned rank_in_cluster() { return running->cta->rank; }

void arrive_at_cluster(bool orders) {
  Cluster& cluster = running->cta->cluster;
  Member& self = member();
  if (self.arrivals++ != self.waits)
    fail("cluster barrier: a thread arrives twice without waiting between");
  self.next = cluster.barrier.arrive(cluster.threads, "cluster barrier", 0, orders);
}

void wait_for_cluster() {
  Member& self = member();
  if (self.waits++ == self.arrivals)
    fail("cluster barrier: a thread waits without having arrived");
  running->cta->cluster.barrier.await(self.next, "cluster barrier");
  self.passed.push_back(self.next);
  waited();
}

// The function finds a place in the CTA's own shared memory.
static Place place_of(const char* operation, const char* what, const void* address, size_t bytes,
                      size_t alignment) {
  Unobserved bookkeeping;
  const std::optional<Place> place = running->cta->find(address, bytes);
  if (!place) fail("%s: the %s is not in shared memory", operation, what);
  if (place->offset % alignment != 0)
    fail("%s: the %s at %s is not aligned to %zu bytes", operation, what, place->text().c_str(),
         alignment);
  return *place;
}

static std::string name_of(const char* what, const Cta& cta, const Place& place) {
  return std::string(what) + " at " + place.text() + " of the cluster's CTA " +
         std::to_string(cta.rank);
}

// The seal goes into shared memory where the mbarrier is: a write there by a thread that does not
// know of the mbarrier is noticed, by ThreadSanitizer, too.
static void check_seal(const Mbarrier& mbarrier, uint64_t seal) {
  if (seal != mbarrier.seal) fail("the %s was overwritten", mbarrier.name.c_str());
}
static void set_seal(void* address, uint64_t seal) {
  __atomic_store_n(static_cast<uint64_t*>(address), seal, __ATOMIC_RELAXED);
}
// The opening of an mbarrier is fenced for the next cluster barrier, even a relaxed one. With no
// cluster barrier between, the opening must be ordered as all memory is, which ThreadSanitizer
// checks by the plain read.
static void check_own_seal(const Mbarrier& mbarrier, void* address) {
  uint64_t* seal = static_cast<uint64_t*>(address);
  const bool fenced = member().waits > mbarrier.arrivals;
  check_seal(mbarrier, fenced ? __atomic_load_n(seal, __ATOMIC_RELAXED) : *seal);
}

// The function opens an inbox or a gate, and returns the opened object.
template <class T, class... Arguments>
static T& open(std::map<const void*, T> Mail::* boxes, const char* operation, const char* what,
               void* address, unsigned most, Arguments... arguments) {
  const Place place = place_of(operation, what, address, Mbarrier::BYTES, Mbarrier::BYTES);
  Cta& cta = *running->cta;
  Unobserved bookkeeping;
  const std::string name = name_of(what, cta, place);
  if (most > Mbarrier::MOST) fail("%s: %u, too many for an mbarrier", operation, most);
  cta.mail.lock.lock();
  const bool taken = cta.mail.inboxes.count(address) || cta.mail.gates.count(address);
  if (taken) fail("%s: the %s is opened twice", operation, name.c_str());
  T& box = (cta.mail.*boxes).try_emplace(address, name, arguments..., member().arrivals)
               .first->second;
  cta.mail.lock.unlock();
  return box;
}

// The function returns an inbox or a gate of the thread's own CTA.
template <class T>
static T& find(std::map<const void*, T> Mail::* boxes, const char* operation, const char* what,
               void* address) {
  const Place place = place_of(operation, what, address, Mbarrier::BYTES, Mbarrier::BYTES);
  Cta& cta = *running->cta;
  Unobserved bookkeeping;
  cta.mail.lock.lock();
  const auto entry = (cta.mail.*boxes).find(address);
  if (entry == (cta.mail.*boxes).end())
    fail("%s: the %s is not open", operation, name_of(what, cta, place).c_str());
  cta.mail.lock.unlock();
  return entry->second;
}

void open_inbox(void* address, unsigned bytes) {
  Inbox& inbox = open(&Mail::inboxes, "inbox_open", "inbox", address, bytes);
  {
    Unobserved bookkeeping;
    inbox.waited.resize(running->cta->grid.threads.count());
    inbox.arm(bytes);
  }
  set_seal(address, Inbox::SEAL);
}

void wait_for_inbox(void* address, int parity) {
  Inbox& inbox = find(&Mail::inboxes, "inbox_wait", "inbox", address);
  if (parity != 0 && parity != 1) fail("inbox_wait: parity %d", parity);
  check_own_seal(inbox, address);
  const unsigned ended =
      inbox.phases.wait(parity, inbox.name.c_str(), [&] { return inbox.lacks(); });
  waited();
  Unobserved bookkeeping;
  Lock& lock = running->cta->mail.lock;
  lock.lock();
  inbox.awaited = std::max(inbox.awaited, ended);
  inbox.waited[running->linear] = ended;
  lock.unlock();
}

void arm_inbox(void* address, unsigned bytes) {
  const char* const operation = "inbox_again";
  Inbox& inbox = find(&Mail::inboxes, operation, "inbox", address);
  check_own_seal(inbox, address);
  past.note();
  Unobserved bookkeeping;
  Lock& lock = running->cta->mail.lock;
  lock.lock();
  const char* const name = inbox.name.c_str();
  if (bytes > Mbarrier::MOST) fail("%s: %u, too many for an mbarrier", operation, bytes);
  if (inbox.armed) fail("%s: the %s expects %d bytes already", operation, name, inbox.missing);
  if (inbox.waited[running->linear] != inbox.phases.ended())
    fail("%s: this thread has not waited for the phase before of the %s", operation, name);
  if (-inbox.missing > int(bytes))
    fail("%s: %d bytes have come to the %s, and not %u", operation, -inbox.missing, name, bytes);
  inbox.phases.tell();
  inbox.arm(bytes);
  lock.unlock();
}

void open_gate(void* address, unsigned count) {
  if (count == 0) fail("gate_open: nobody would pass");
  open(&Mail::gates, "gate_open", "gate", address, count, count);
  set_seal(address, Gate::SEAL);
}

void pass_gate(void* address) {
  Gate& gate = find(&Mail::gates, "gate_pass", "gate", address);
  check_own_seal(gate, address);
  past.note();
  {
    Unobserved bookkeeping;
    gate.lock.lock();
  }
  gate.phases.order();
  gate.phases.tell();
  Unobserved bookkeeping;
  if (--gate.missing == 0) {
    gate.missing = gate.count;
    gate.phases.end();
  }
  gate.lock.unlock();
}

void wait_for_gate(void* address, int parity) {
  Gate& gate = find(&Mail::gates, "gate_wait", "gate", address);
  if (parity != 0 && parity != 1) fail("gate_wait: parity %d", parity);
  check_own_seal(gate, address);
  gate.phases.wait(parity, gate.name.c_str(), [&] { return gate.lacks(); });
  waited();
}

static void send(const char* operation, void* slot, void* inbox, int rank, const void* data,
                 size_t bytes, size_t alignment, bool in_bulk) {
  const Place slot_place = place_of(operation, "slot", slot, bytes, alignment);
  const Place inbox_place =
      place_of(operation, "inbox", inbox, Mbarrier::BYTES, Mbarrier::BYTES);
  Cluster& cluster = running->cta->cluster;
  if (rank < 0 || rank >= int(cluster.ctas.size()))
    fail("%s: CTA %d of a cluster of %zu", operation, rank, cluster.ctas.size());
  Cta& peer = *cluster.ctas[rank];
  unsigned char copy[Message::MOST];
  std::memcpy(copy, data, bytes);
  Message message{nullptr, {}};
  uint64_t* seal;
  {
    Unobserved bookkeeping;
    message.slot = peer.at(slot_place);
    message.data.assign(copy, copy + bytes);
    seal = reinterpret_cast<uint64_t*>(peer.at(inbox_place));
  }
  const uint64_t sealed = __atomic_load_n(seal, __ATOMIC_RELAXED);
  past.note();
  Unobserved bookkeeping;
  peer.mail.lock.lock();
  const std::string name = name_of("inbox", peer, inbox_place);
  const auto entry = peer.mail.inboxes.find(seal);
  if (entry == peer.mail.inboxes.end()) fail("%s: the %s is not open", operation, name.c_str());
  if (peer.ended()) fail("%s: the CTA of the %s has ended", operation, name.c_str());
  Inbox& box = entry->second;
  // Only by a cluster barrier does a thread know that another CTA's inbox is open.
  if (member().waits <= box.arrivals)
    fail("%s: no cluster barrier was passed since the %s was opened", operation, name.c_str());
  check_seal(box, sealed);
  if (box.armed && int(bytes) > box.missing)
    fail("%s: the %s expects %d bytes and not %zu more", operation, name.c_str(), box.missing, bytes);
  if (int(bytes) - box.missing > int(Mbarrier::MOST))
    fail("%s: too many bytes for the %s", operation, name.c_str());
  const bool again = peer.mail.claim(message, box);
  if (in_bulk && again && !member().fenced)
    fail("%s: no bulk_fence since this thread waited, and the place has been used", operation);
  box.take(std::move(message), again, member().passed);
  peer.mail.lock.unlock();
}

void send(const char* operation, void* slot, void* inbox, int rank, const void* data, size_t bytes) {
  send(operation, slot, inbox, rank, data, bytes, bytes, false);
}

void fence_bulk() { member().fenced = true; }

// A bulk load is a message from memory to this CTA itself.
void load_bulk(void* shared, const void* global, unsigned bytes, void* inbox) {
  constexpr unsigned UNIT = 16;  // Bulk loads count in units of so many bytes.
  const char* const operation = "load_bulk";
  if (bytes == 0 || bytes % UNIT != 0 || bytes > Message::MOST)
    fail("%s: %u bytes, expected a multiple of %u up to %u", operation, bytes, UNIT, Message::MOST);
  if (reinterpret_cast<uintptr_t>(global) % UNIT != 0)
    fail("%s: the source is not aligned to %u bytes", operation, UNIT);
  send(operation, shared, inbox, int(rank_in_cluster()), global, bytes, UNIT, true);
}

// --- asynchronous loads

void load(const char* operation, void* shared, const void* global) {
  place_of(operation, "target", shared, Load::BYTES, Load::BYTES);
  if (reinterpret_cast<uintptr_t>(global) % Load::BYTES != 0)
    fail("%s: the source is not aligned to %u bytes", operation, Load::BYTES);
  Member& self = member();
  Load load{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), {},
            self.groups};
  for (const Load& other : self.loads)
    if (other.to == load.to) fail("%s: the target is loaded twice without a wait", operation);
  std::memcpy(load.data, global, Load::BYTES);
  self.loads.push_back(load);
  if (past.knows()) {
    past.note();
    past.overwrite(shared, Load::BYTES);
  }
  std::memcpy(shared, POISON.data(), Load::BYTES);
}

void commit_loads() { ++member().groups; }

void wait_for_loads(unsigned groups) {
  Member& self = member();
  std::erase_if(self.loads, [&](const Load& load) {
    if (load.group + groups >= self.groups) return false;
    if (std::memcmp(load.data, load.from, Load::BYTES) != 0)
      fail("the source of an asynchronous load was written before the wait for it");
    std::memcpy(load.to, load.data, Load::BYTES);
    return true;
  });
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

// The function says which buffer a forbidden access was meant for.
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
  static unsigned char stack[64 * 1024];  // A fiber that overflows its stack has none left.
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
  constexpr int OPTIONS = 7;
  if (count != 1 + OPTIONS + int(parameters))
    fail("the kernel takes %u arguments, got %d", parameters, count - 1 - OPTIONS);
  const auto option = [&](int i) { return std::string(std::strchr(words[i], '=') + 1); };
  Grid grid;
  grid.ctas = parse_dim3(option(1));
  grid.threads = parse_dim3(option(2));
  grid.dynamic_shared = std::stoul(option(3));
  grid.cluster = std::stoul(option(4));
  grid.resident = std::stoul(option(5));
  const bool close_global = option(6) == "1";
  be_patient(std::stoul(option(7)));
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
