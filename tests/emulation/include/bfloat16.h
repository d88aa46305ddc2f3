// This header has bfloat16 and the conversions that TileLang emits.
#pragma once

#include <bit>
#include <cstdint>

#include "vector_types.h"

struct bfloat16_t {
  uint16_t storage;

  bfloat16_t() = default;
  // The conversion is cvt.rn.bf16.f32: it rounds to nearest, ties to even; every NaN becomes
  // 0x7fff.
  explicit bfloat16_t(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    storage = value != value ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t(storage) << 16); }
};

using __nv_bfloat16 = bfloat16_t;
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {bfloat16_t(v.x), bfloat16_t(v.y)}; }
