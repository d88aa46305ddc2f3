// This header has mbarriers in shared memory: inboxes, which count the bytes that CTAs of a cluster
// send, and gates, which count the threads that pass.
#pragma once

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#ifdef EMULATION_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulation {

struct Message {
  static constexpr unsigned MOST = 1024;  // A message has at most so many bytes.
  unsigned char* slot;
  std::vector<unsigned char> data;
};

inline const std::vector<unsigned char> POISON(Message::MOST, GuardedMemory::POISON);

struct Mbarrier {
  static constexpr size_t BYTES = 8;
  // An mbarrier can expect so many bytes or threads.
  static constexpr unsigned MOST = (1u << 20) - 1;

  Mbarrier(std::string name, uint64_t seal, unsigned arrivals)
      : name(std::move(name)), seal(seal), arrivals(arrivals) {}

  const std::string name;
  const uint64_t seal;      // The mbarrier holds this in shared memory.
  const unsigned arrivals;  // The opener had arrived so often at the cluster barrier.
  Phases phases;
};

// A phase ends when the inbox is armed, that is told how many bytes to expect, and those bytes have
// come. Messages for the phase under way may come before the inbox is armed. No message is
// delivered before its phase ends: who does not wait reads poison, in whatever order the sends
// happen.
struct Inbox : Mbarrier {
  static constexpr uint64_t SEAL = 0x6d6265746c69616d;

  Inbox(std::string name, unsigned arrivals) : Mbarrier(std::move(name), SEAL, arrivals) {}

  // The caller of these functions holds the lock, and has done the checks.
  void arm(unsigned bytes) {
    armed = true;
    missing += int(bytes);
    finish();
  }
  void take(Message message, bool again, const std::vector<Barrier::Opening>& passed) {
    missing -= int(message.data.size());
    if (again) past.overwrite(message.slot, message.data.size());
    phases.tell();
    courier.run(passed,
                [&] { Courier::write(message.slot, POISON.data(), message.data.size()); });
    messages.push_back(std::move(message));
    finish();
  }
  std::string lacks() const {
    if (!armed) return "nobody has called inbox_again";
    return std::to_string(missing) + " bytes are missing";
  }

  int missing = 0;  // This counts bytes, below zero when they come before the inbox is armed.
  bool armed = false;
  unsigned awaited = 0;            // So many phases have been waited for, and have come.
  std::vector<unsigned> waited;    // This counts the same for each thread of the CTA.
  std::vector<Message> messages;   // These are of the phase under way.
  bool brought = false;            // The phase before had messages.
  Courier courier;

 private:
  void finish() {
    if (!armed || missing != 0) return;
    courier.run({}, [&] {
      for (const Message& m : messages) Courier::write(m.slot, m.data.data(), m.data.size());
      phases.order();
    });
    brought = !messages.empty();
    messages.clear();
    armed = false;
    phases.end();
  }
};

struct Gate : Mbarrier {
  static constexpr uint64_t SEAL = 0x6d62657467617465;

  Gate(std::string name, unsigned count, unsigned arrivals)
      : Mbarrier(std::move(name), SEAL, arrivals), count(count), missing(count) {}

  std::string lacks() const { return std::to_string(missing) + " threads have not passed"; }

  const unsigned count;
  unsigned missing;
  Lock lock;
};

// A Mail has the inboxes and gates of a CTA, by address.
struct Mail {
  struct Sent {
    size_t bytes;
    const Inbox* inbox;
    unsigned phase;
  };

  // Two sends to the same bytes are not ordered, whoever sends, unless a wait lies between. The
  // function returns whether an earlier message went to the same bytes.
  bool claim(const Message& message, Inbox& inbox) {
    const size_t bytes = message.data.size();
    bool again = false;
    auto next = slots.lower_bound(message.slot + bytes);
    while (next != slots.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second.bytes <= message.slot) break;
      if (before->second.inbox->awaited <= before->second.phase)
        fail("data race: a slot of the %s is sent to twice, %zu bytes at %ld bytes from each other",
             inbox.name.c_str(), bytes, labs(message.slot - before->first));
      next = slots.erase(before);
      again = true;
    }
    slots[message.slot] = {bytes, &inbox, inbox.phases.ended()};
    return again;
  }

  Lock lock;
  std::map<const void*, Inbox> inboxes;
  std::map<const void*, Gate> gates;
  std::map<unsigned char*, Sent> slots;
};

}  // namespace emulation
