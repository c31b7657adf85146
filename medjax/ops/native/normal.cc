// Standard normal numbers from counters, as an XLA FFI handler: the numbers of `jax.random.normal`, made at the speed of
// memory.
//
// Threefry 2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of the number's index;
// its 23 leading bits as a uniform number in (-1, 1); the inverse error function of that by Giles' single-precision
// polynomials ("Approximating the erfinv function", GPU Computing Gems, 2011).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <string>

#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace medjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 4096;

inline uint32_t Rotate(uint32_t x, int by) { return x << by | x >> (32 - by); }

template <int A, int B, int C, int D>
inline void Rounds(uint32_t& x, uint32_t& y) {
  x += y;
  y = Rotate(y, A) ^ x;
  x += y;
  y = Rotate(y, B) ^ x;
  x += y;
  y = Rotate(y, C) ^ x;
  x += y;
  y = Rotate(y, D) ^ x;
}

inline uint32_t Bits(uint32_t k0, uint32_t k1, uint32_t high, uint32_t low) {
  const uint32_t k2 = k0 ^ k1 ^ 0x1BD11BDAu;
  uint32_t x = high + k0, y = low + k1;
  Rounds<13, 15, 26, 6>(x, y);
  x += k1, y += k2 + 1;
  Rounds<17, 29, 16, 24>(x, y);
  x += k2, y += k0 + 2;
  Rounds<13, 15, 26, 6>(x, y);
  x += k0, y += k1 + 3;
  Rounds<17, 29, 16, 24>(x, y);
  x += k1, y += k2 + 4;
  Rounds<13, 15, 26, 6>(x, y);
  x += k2, y += k0 + 5;
  return x ^ y;
}

// ln x of a normal x.
inline float Log(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t shifted = bits - 0x3F3504F3;
  const int32_t exponent = shifted >> 23;
  bits = (shifted & 0x007FFFFF) + 0x3F3504F3;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float s = (m - 1) / (m + 1), t = s * s;
  const float series = 1 + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
  return 0.6931471806f * static_cast<float>(exponent) + 2 * s * series;
}

// √2 erfinv(x), |x| < 1. Both polynomials are evaluated and one is picked without a branch.
inline float Normal(float x) {
  const float w = -Log((1 - x) * (1 + x));
  const float near = w - 2.5f, far = std::sqrt(w) - 3.0f;
  float p = 2.81022636e-08f;
  p = 3.43273939e-07f + p * near;
  p = -3.5233877e-06f + p * near;
  p = -4.39150654e-06f + p * near;
  p = 0.00021858087f + p * near;
  p = -0.00125372503f + p * near;
  p = -0.00417768164f + p * near;
  p = 0.246640727f + p * near;
  p = 1.50140941f + p * near;
  float q = -0.000200214257f;
  q = 0.000100950558f + q * far;
  q = 0.00134934322f + q * far;
  q = -0.00367342844f + q * far;
  q = 0.00573950773f + q * far;
  q = -0.0076224613f + q * far;
  q = 0.00943887047f + q * far;
  q = 1.00167406f + q * far;
  q = 2.83297682f + q * far;
  const float central = static_cast<float>(w < 5.0f);
  return 1.41421356f * x * (q + central * (p - q));
}

void Fill(uint32_t k0, uint32_t k1, int64_t size, float* out) {
  const float low = std::nextafter(-1.0f, 0.0f);
#pragma omp for schedule(static)
  for (int64_t first = 0; first < size; first += kBlock) {
    const int32_t length = static_cast<int32_t>(size - first < kBlock ? size - first : kBlock);
    const uint32_t high = static_cast<uint32_t>(first >> 32), start = static_cast<uint32_t>(first);
    float* to = out + first;
#pragma GCC ivdep
    for (int32_t i = 0; i < length; ++i) {
      const uint32_t bits = Bits(k0, k1, high, start + static_cast<uint32_t>(i)) >> 9 | 0x3F800000u;
      float unit;
      std::memcpy(&unit, &bits, sizeof unit);
      to[i] = Normal((unit - 1) * (1 - low) + low);
    }
  }
}

ffi::Error Normals(ffi::BufferR2<ffi::F32> keys, ffi::Result<ffi::BufferR2<ffi::F32>> out) {
  try {
    RunOnTeam([&] {
      const int64_t rows = out->dimensions()[0], size = out->dimensions()[1];
      for (int64_t n = 0; n < rows; ++n) {
        uint32_t key[2];
        std::memcpy(key, keys.typed_data() + 2 * n, sizeof key);
#pragma omp parallel
        Fill(key[0], key[1], size, out->typed_data() + n * size);
      }
    });
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("normal: ") + error.what());
  }
}

}  // namespace
}  // namespace medjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_normal, medjax::Normals,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
