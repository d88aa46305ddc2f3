// Everything that a translated kernel includes.
#pragma once

#include "mhc_device.h"
#include "tilelang.h"

// What the declarations of shared memory become. The alignment that they ask for is not modelled
// beyond 16 bytes.
#define EMULATION_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(emulation::dynamic_shared())
#define EMULATION_STATIC_SHARED(type, name, extent) \
  static const char name##_declaration = 0;         \
  type(&name)[extent] = *static_cast<type(*)[extent]>( \
      emulation::static_shared(&name##_declaration, sizeof(type[extent])))

#define EMULATION_MAIN(kernel)                                             \
  int main(int count, char** words) {                                      \
    using Call = emulation::Call<&kernel>;                                 \
    return emulation::launch(count, words, Call::parameters, &Call::run);  \
  }
