// Inboxes: mbarriers in shared memory that count the bytes which CTAs of a cluster send.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "memory.h"
#ifdef EMULATION_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulation {

struct Message {
  static constexpr unsigned MOST = 16;  // bytes
  unsigned char* slot;
  unsigned bytes;
  unsigned char data[MOST];
};

inline const std::vector<unsigned char> POISON(Message::MOST, GuardedMemory::POISON);

// Nothing is delivered before everything has come: who does not wait reads poison, in whatever order
// the sends happen.
struct Inbox {
  static constexpr uint64_t SEAL = 0x6d6265746c69616d;  // what an open inbox holds in shared memory
  static constexpr size_t BYTES = sizeof(SEAL);
  static constexpr unsigned MOST_BYTES = (1u << 20) - 1;  // that an mbarrier can expect

  Inbox(std::string name, unsigned bytes, unsigned arrivals)
      : name(std::move(name)), missing(bytes), arrivals(arrivals) {}

  // The checks of a message are done; the caller holds the lock.
  void take(const Message& message, const std::vector<Barrier::Opening>& passed) {
    messages.push_back(message);
    missing -= message.bytes;
    courier.run(passed, [&] {
      Courier::write(message.slot, POISON.data(), message.bytes);
      if (missing != 0) return;
      for (const Message& m : messages) Courier::write(m.slot, m.data, m.bytes);
      full.order();
    });
    if (missing == 0) full.open();
  }

  const std::string name;
  unsigned missing;         // bytes
  const unsigned arrivals;  // of the opener at the cluster barrier, before it opened the inbox
  bool awaited = false;     // somebody has waited, so everything has come
  std::vector<Message> messages;
  Gate full;
  Courier courier;
};

// The inboxes of a CTA.
struct Mail {
  struct Sent {
    unsigned bytes;
    const Inbox* inbox;
  };

  // Two sends to the same bytes are not ordered, whoever sends, unless a wait lies between.
  void claim(const Message& message, const Inbox& inbox) {
    auto next = slots.lower_bound(message.slot + message.bytes);
    while (next != slots.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second.bytes <= message.slot) break;
      if (!before->second.inbox->awaited)
        fail("data race: a slot of the %s is sent to twice, %u bytes at %ld bytes from each other",
             inbox.name.c_str(), message.bytes, labs(message.slot - before->first));
      next = slots.erase(before);
    }
    slots[message.slot] = {message.bytes, &inbox};
  }

  Lock lock;
  std::map<const void*, Inbox> inboxes;  // by address
  std::map<unsigned char*, Sent> slots;
};

}  // namespace emulation
