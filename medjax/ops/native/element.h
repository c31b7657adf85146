// Elements of images: float32 or bfloat16, computed with in float32.
#ifndef MEDJAX_ELEMENT_H_
#define MEDJAX_ELEMENT_H_

#include <cstdint>
#include <cstring>

namespace medjax {

struct BFloat16 {
  uint16_t bits;
};

inline float Load(float value) { return value; }
inline float Load(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void Store(float value, float& at) { at = value; }
inline void Store(float value, BFloat16& at) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  at.bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0);
}

}  // namespace medjax

#endif  // MEDJAX_ELEMENT_H_
