// Everything that a translated kernel includes.
#pragma once

#include "launch.h"
#include "mhc_device.h"
#include "tilelang.h"

// What the declarations of shared memory become. The alignment that they ask for is not modelled
// beyond 16 bytes.
#define EMULATION_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emulation::self()->cta->dynamic_shared.data())
#define EMULATION_STATIC_SHARED(type, name, extent) \
  static const char name##_declaration = 0;         \
  type(&name)[extent] = *static_cast<type(*)[extent]>( \
      emulation::static_shared(&name##_declaration, sizeof(type[extent])))

#define EMULATION_MAIN(kernel) \
  int main(int count, char** words) { return emulation::launch(count, words, kernel); }
