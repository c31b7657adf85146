// The Gaussian error linear unit, x Φ(x), and its gradient, in one read and one write each, as XLA FFI handlers.
// Without traps to keep, compilers turn the choices below into selections, and vectorise.
#pragma GCC optimize("no-trapping-math")

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <string>

#include "element.h"
#include "exponential.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace medjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunk = 4096;  // elements a thread takes at a time

// e^-v for v >= 0; 0 where that is below the normal numbers, NaN for NaN.
inline float ExpOfMinus(float v) { return Exp2(std::min(v, 200.0f) * -1.442695041f); }

struct Normal {
  float density, distribution;  // exp(-x² / 2) and Φ(x)
};

// Φ by Abramowitz and Stegun 7.1.26: the error function to 1.5e-7.
inline Normal NormalAt(float x) {
  const float a = x < 0 ? -x : x, e = ExpOfMinus(0.5f * x * x);
  const float t = 1 / (1 + 0.23164189f * a);  // 0.3275911 / √2
  const float p = t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
  const float tail = p * e;
  return {e, x < 0 ? tail : 1 - tail};
}

template <typename T, typename Body>
ffi::Error Each(int64_t count, const Body& body) {
  try {
    RunOnTeam([&] {
#pragma omp parallel for schedule(static)
      for (int64_t first = 0; first < count; first += kChunk) body(first, std::min(first + kChunk, count));
    });
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("gelu: ") + error.what());
  }
}

template <typename T>
ffi::Error Forward(const void* in, void* out, int64_t count) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(out);
  return Each<T>(count, [=](int64_t first, int64_t last) {
#pragma GCC ivdep
    for (int64_t i = first; i < last; ++i) {
      const float v = Load(x[i]);
      // Φ(±inf) is 0 or 1, and 0 * inf is no number: below this all of x Φ(x) is 0.
      const float w = v < -40.0f ? -40.0f : v;
      Store(w * NormalAt(w).distribution, y[i]);
    }
  });
}

template <typename T>
ffi::Error Backward(const void* in, const void* gradient, void* out, int64_t count) {
  const T *x = static_cast<const T*>(in), *g = static_cast<const T*>(gradient);
  T* y = static_cast<T*>(out);
  return Each<T>(count, [=](int64_t first, int64_t last) {
#pragma GCC ivdep
    for (int64_t i = first; i < last; ++i) {
      const float v = Load(x[i]);
      float w = v < -40.0f ? -40.0f : v;
      w = w > 40.0f ? 40.0f : w;
      const Normal n = NormalAt(w);
      Store(Load(g[i]) * (n.distribution + w * 0.3989422804f * n.density), y[i]);
    }
  });
}

ffi::Error Gelu(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t count = static_cast<int64_t>(x.element_count());
  switch (x.element_type()) {
    case ffi::DataType::F32: return Forward<float>(x.untyped_data(), y->untyped_data(), count);
    case ffi::DataType::BF16: return Forward<BFloat16>(x.untyped_data(), y->untyped_data(), count);
    default: return ffi::Error(ffi::ErrorCode::kInvalidArgument, "gelu: only float32 and bfloat16");
  }
}

ffi::Error GeluGrad(ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t count = static_cast<int64_t>(x.element_count());
  switch (x.element_type()) {
    case ffi::DataType::F32: return Backward<float>(x.untyped_data(), g.untyped_data(), y->untyped_data(), count);
    case ffi::DataType::BF16: return Backward<BFloat16>(x.untyped_data(), g.untyped_data(), y->untyped_data(), count);
    default: return ffi::Error(ffi::ErrorCode::kInvalidArgument, "gelu: only float32 and bfloat16");
  }
}

}  // namespace
}  // namespace medjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_gelu, medjax::Gelu,
                              xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    medjax_gelu_grad, medjax::GeluGrad,
    xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Arg<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>());
