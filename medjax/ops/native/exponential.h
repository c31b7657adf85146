// The exponential function in a form that compilers vectorise: no branch, no call.
#ifndef MEDJAX_EXPONENTIAL_H_
#define MEDJAX_EXPONENTIAL_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace medjax {

// 2^x for x up to about 0; 0 below the normal numbers.
inline float Exp2(float x) {
  const int32_t whole = static_cast<int32_t>(x - 0.5f);
  const float f = (x - static_cast<float>(whole)) * 0.6931471806f;
  const float p =
      1 + f * (1 + f * (0.5f + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120 + f * (1.0f / 720))))));
  const int32_t bits = (std::max(whole, -127) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

}  // namespace medjax

#endif  // MEDJAX_EXPONENTIAL_H_
