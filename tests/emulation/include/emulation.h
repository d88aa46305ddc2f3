// A translated kernel includes this header alone.
#pragma once

#include "mhc_device.h"
#include "tilelang.h"

// The declarations of shared memory become these two. The alignment that a declaration asks for is
// not modelled beyond 16 bytes.
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
