// Point operations on intensities that need the channel's own moments: contrast, brightness and power laws, in place, as
// an XLA FFI handler.
//
// Images are [B, V, C]. A channel is chosen by its gate; the others stay as they are. Sums run over chunks of fixed size
// whose partial sums are added in order, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <omp.h>
#include <string>
#include <type_traits>
#include <vector>

#include "element.h"
#include "exponential.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace medjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunk = 8192;  // elements of a chunk, about
constexpr float kSmall = 1e-6f;   // least range and deviation divided by
enum Flags { kAboutMean = 1, kKeepRange = 2, kPower = 4, kInvert = 8, kKeepMoments = 16 };

struct Moments {
  float low, high, mean, deviation;
};

// Elements are worked on in blocks of whole voxels and whole vectors.
struct Cut {
  int64_t channels, voxels, block, chunk, chunks;
  Cut(int64_t voxels, int64_t channels) : channels(channels), voxels(voxels) {
    block = std::lcm(channels, int64_t{16});
    block *= (64 + block - 1) / block;
    chunk = std::max<int64_t>(1, kChunk / block) * block;
    chunks = (voxels * channels + chunk - 1) / chunk;
  }
};

// The functions below have no branch and clamp as integers: compilers do not vectorise loops with the alternatives.

// log2 of x in [0, inf), of the smallest normal number where x is below it: exponent, and the series of the inverse
// hyperbolic tangent of the mantissa in [1/√2, √2).
inline float Log2(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t shifted = std::max(bits, 0x00800000) - 0x3F3504F3;
  const int32_t exponent = shifted >> 23;
  bits = (shifted & 0x007FFFFF) + 0x3F3504F3;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float s = (m - 1) / (m + 1), t = s * s;
  const float series = 1 + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
  return static_cast<float>(exponent) + 2.885390082f * s * series;
}

// x^power for x from 0 to about 1.
inline float Pow(float x, float power) { return Exp2(power * Log2(x)) * static_cast<float>(x > 0); }

template <typename Body>
inline void ForBlocks(const Cut& cut, int64_t k, const Body& body) {
  const int64_t end = std::min((k + 1) * cut.chunk, cut.voxels * cut.channels);
  for (int64_t i = k * cut.chunk; i < end; i += cut.block) body(i, std::min(cut.block, end - i));
}

template <typename T>
void MomentsOf(const Cut& cut, const T* x, Moments* moments) {
  const int64_t c = cut.channels, b = cut.block;
  std::vector<float> pivot(b);
  for (int64_t j = 0; j < b; ++j) pivot[j] = Load(x[j % c]);
  struct Part {
    float low, high;
    double sum, square;
  };
  std::vector<Part> parts(cut.chunks * c);
#pragma omp parallel
  {
    std::vector<float> work(4 * b);
    float *low = work.data(), *high = low + b, *sum = high + b, *square = sum + b;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < cut.chunks; ++k) {
      std::fill(low, low + b, std::numeric_limits<float>::infinity());
      std::fill(high, high + b, -std::numeric_limits<float>::infinity());
      std::fill(sum, sum + 2 * b, 0.0f);
      ForBlocks(cut, k, [&](int64_t i, int64_t length) {
        const T* in = x + i;
        const float* p = pivot.data();
#pragma GCC ivdep
        for (int64_t j = 0; j < length; ++j) {
          const float v = Load(in[j]), d = v - p[j];
          low[j] = v < low[j] ? v : low[j];
          high[j] = v > high[j] ? v : high[j];
          sum[j] += d;
          square[j] += d * d;
        }
      });
      for (int64_t q = 0; q < c; ++q) {
        Part part{low[q], high[q], 0, 0};
        for (int64_t j = q; j < b; j += c) {
          part.low = std::min(part.low, low[j]);
          part.high = std::max(part.high, high[j]);
          part.sum += sum[j];
          part.square += square[j];
        }
        parts[k * c + q] = part;
      }
    }
  }
  for (int64_t q = 0; q < c; ++q) {
    Part all = parts[q];
    for (int64_t k = 1; k < cut.chunks; ++k) {
      const Part& part = parts[k * c + q];
      all.low = std::min(all.low, part.low);
      all.high = std::max(all.high, part.high);
      all.sum += part.sum;
      all.square += part.square;
    }
    const double n = static_cast<double>(cut.voxels), mean = all.sum / n;
    const double variance = std::max(0.0, all.square / n - mean * mean);
    moments[q] = {all.low, all.high, static_cast<float>(pivot[q] + mean), static_cast<float>(std::sqrt(variance))};
  }
}

// out = on ? clip(x * gain + shift, low, high) : x, with the tables repeated over a block.
template <typename T>
void Linear(const Cut& cut, const std::vector<float>& on, const std::vector<float>& gain,
            const std::vector<float>& shift, const std::vector<float>& low, const std::vector<float>& high, T* x) {
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < cut.chunks; ++k) {
    ForBlocks(cut, k, [&](int64_t i, int64_t length) {
      T* v = x + i;
      const float *o = on.data(), *g = gain.data(), *s = shift.data(), *l = low.data(), *h = high.data();
#pragma GCC ivdep
      for (int64_t j = 0; j < length; ++j) {
        const float own = Load(v[j]);
        float y = own * g[j] + s[j];
        y = y < l[j] ? l[j] : y;
        y = y > h[j] ? h[j] : y;
        Store(o[j] != 0 ? y : own, v[j]);
      }
    });
  }
}

// out = on ? origin + range * ((x - origin) * gain)^power : x. The difference is taken first: it is 0 at the origin.
template <typename T>
void Power(const Cut& cut, const std::vector<float>& on, const std::vector<float>& gain,
           const std::vector<float>& origin, const std::vector<float>& power, const std::vector<float>& range,
           const T* x, float* out) {
#pragma omp parallel
  {
    std::vector<float> work(cut.block);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < cut.chunks; ++k) {
      ForBlocks(cut, k, [&](int64_t i, int64_t length) {
        const T* v = x + i;
        float *to = out + i, *curved = work.data();
        const float *o = on.data(), *g = gain.data(), *s = origin.data(), *p = power.data(), *r = range.data();
#pragma GCC ivdep
        for (int64_t j = 0; j < length; ++j) {
          curved[j] = Pow((Load(v[j]) - s[j]) * g[j], p[j]) * r[j] + s[j];
        }
#pragma GCC ivdep
        for (int64_t j = 0; j < length; ++j) to[j] = o[j] != 0 ? curved[j] : Load(v[j]);
      });
    }
  }
}

template <typename T>
void Example(const Cut& cut, const float* gate, const float* gain, const float* offset, const float* power, int flags,
             float* scratch, T* x) {
  const int64_t c = cut.channels, b = cut.block;
  std::vector<Moments> before(c);
  if (flags & (kAboutMean | kKeepRange | kPower)) MomentsOf(cut, x, before.data());
  std::vector<float> on(b), g(b), s(b), low(b), high(b), p(b), range(b);
  const auto repeat = [&](std::vector<float>& table, const auto& value) {
    for (int64_t j = 0; j < b; ++j) table[j] = value(j % c);
  };
  const float inf = std::numeric_limits<float>::infinity();
  repeat(on, [&](int64_t q) { return gate[q]; });
  if (!(flags & kPower)) {
    repeat(g, [&](int64_t q) { return gain[q]; });
    repeat(s, [&](int64_t q) {
      return offset[q] + (flags & kAboutMean ? before[q].mean - before[q].mean * gain[q] : 0.0f);
    });
    repeat(low, [&](int64_t q) { return flags & kKeepRange ? before[q].low : -inf; });
    repeat(high, [&](int64_t q) { return flags & kKeepRange ? before[q].high : inf; });
    return Linear(cut, on, g, s, low, high, x);
  }
  // Into 0..1, from the top where inverted; the power; and back.
  const auto width = [&](int64_t q) { return std::max(before[q].high - before[q].low, kSmall); };
  const bool invert = flags & kInvert;
  repeat(g, [&](int64_t q) { return (invert ? -1 : 1) / width(q); });
  repeat(s, [&](int64_t q) { return invert ? before[q].high : before[q].low; });
  repeat(p, [&](int64_t q) { return power[q]; });
  repeat(range, [&](int64_t q) { return (invert ? -1 : 1) * width(q); });
  float* curved;
  if constexpr (std::is_same_v<T, float>) {
    curved = x;
  } else {
    curved = scratch;
  }
  Power(cut, on, g, s, p, range, x, curved);
  if (flags & kKeepMoments) {
    std::vector<Moments> after(c);
    MomentsOf(cut, curved, after.data());
    const auto stretch = [&](int64_t q) { return before[q].deviation / std::max(after[q].deviation, kSmall); };
    repeat(g, stretch);
    repeat(s, [&](int64_t q) { return before[q].mean - after[q].mean * stretch(q); });
    repeat(low, [&](int64_t) { return -inf; });
    repeat(high, [&](int64_t) { return inf; });
    Linear(cut, on, g, s, low, high, curved);
  }
  if constexpr (!std::is_same_v<T, float>) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < cut.voxels * c; ++i) {
      if (gate[i % c] != 0) Store(curved[i], x[i]);
    }
  }
}

using F32 = ffi::BufferR2<ffi::F32>;

ffi::Error Tone(F32 gate, ffi::AnyBuffer in, F32 gain, F32 offset, F32 power, ffi::Result<ffi::AnyBuffer> out,
                int32_t flags) {
  const auto shape = in.dimensions();
  const int64_t channels = shape[4], voxels = shape[1] * shape[2] * shape[3];
  if (in.untyped_data() != out->untyped_data()) std::copy_n(static_cast<const char*>(in.untyped_data()), in.size_bytes(),
                                                            static_cast<char*>(out->untyped_data()));
  const float* const on = gate.typed_data();
  if (std::all_of(on, on + shape[0] * channels, [](float g) { return g == 0; })) return ffi::Error::Success();
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    try {
      RunOnTeam([&] {
        const Cut cut(voxels, channels);
        float* scratch = nullptr;
        if (!std::is_same_v<T, float> && (flags & kPower)) {
          scratch = static_cast<float*>(Scratch(voxels * channels * sizeof(float)));
        }
        for (int64_t n = 0; n < shape[0]; ++n) {
          const int64_t at = n * channels;
          if (std::all_of(on + at, on + at + channels, [](float g) { return g == 0; })) continue;
          Example(cut, on + at, gain.typed_data() + at, offset.typed_data() + at, power.typed_data() + at, flags,
                  scratch, static_cast<T*>(out->untyped_data()) + at * voxels);
        }
      });
      return ffi::Error::Success();
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string("tone: ") + error.what());
    }
  };
  switch (in.element_type()) {
    case ffi::DataType::F32: return run(static_cast<float*>(nullptr));
    case ffi::DataType::BF16: return run(static_cast<BFloat16*>(nullptr));
    default: return ffi::Error(ffi::ErrorCode::kInvalidArgument, "tone: only float32 and bfloat16");
  }
}

}  // namespace
}  // namespace medjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_tone, medjax::Tone,
                              xla::ffi::Ffi::Bind()
                                  .Arg<medjax::F32>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<medjax::F32>()
                                  .Arg<medjax::F32>()
                                  .Arg<medjax::F32>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("flags"));
