// Sparse linear maps along the axes of chosen channels, in place, as an XLA FFI handler.
//
// Along an axis of N voxels, output i is the sum over k of weight[i, k] * input[index[i, k]]: blurring, resampling and
// whatever else is a small number of taps. Images are [B, X, Y, Z, C], tables [B, C, N, K]. An image is read once and
// written once: the x axis goes from the image into planes of one channel, y and z are done plane by plane in cache.
#include <algorithm>
#include <cstdint>
#include <omp.h>
#include <string>
#include <type_traits>
#include <vector>

#include "element.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace medjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kColumns = 512;  // voxels of a (y, z) plane taken through the x axis at once

// The taps of one channel along one axis. `taps` is 0 where the map is the identity.
struct Axis {
  const int32_t* index = nullptr;
  const float* weight = nullptr;
  int64_t n = 0, taps = 0;
  std::vector<int32_t> index_first;  // [taps, n]: voxels last
  std::vector<float> weight_first;
  std::vector<int64_t> low, high, shift;  // of each tap: over [low, high) it takes the input at i + shift

  void Set(const int32_t* i, const float* w, int64_t size, int64_t k) {
    index = i;
    weight = w;
    n = size;
    taps = 0;
    for (int64_t v = 0; v < n && taps == 0; ++v) {
      float own = 0;
      bool other = false;
      for (int64_t t = 0; t < k; ++t) {
        const float share = w[v * k + t];
        if (i[v * k + t] == v) {
          own += share;
        } else if (share != 0) {
          other = true;
        }
      }
      if (other || own != 1.0f) taps = k;
    }
    if (taps == 0) return;
    index_first.resize(taps * n);
    weight_first.resize(taps * n);
    low.assign(taps, 0);
    high.assign(taps, 0);
    shift.assign(taps, 0);
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t v = 0; v < n; ++v) {
        index_first[t * n + v] = index[v * taps + t];
        weight_first[t * n + v] = weight[v * taps + t];
      }
      const int32_t* line = &index_first[t * n];
      const int64_t middle = n / 2;
      shift[t] = line[middle] - middle;
      int64_t a = middle, b = middle + 1;
      while (a > 0 && line[a - 1] - (a - 1) == shift[t]) --a;
      while (b < n && line[b] - b == shift[t]) ++b;
      low[t] = a;
      high[t] = b;
    }
  }

  // One contiguous line.
  void Line(const float* in, float* out) const {
    std::fill(out, out + n, 0.0f);
    for (int64_t t = 0; t < taps; ++t) {
      const int32_t* at = &index_first[t * n];
      const float* w = &weight_first[t * n];
      for (int64_t v = 0; v < low[t]; ++v) out[v] += w[v] * in[at[v]];
      const float* moved = in + shift[t];
#pragma GCC ivdep
      for (int64_t v = low[t]; v < high[t]; ++v) out[v] += w[v] * moved[v];
      for (int64_t v = high[t]; v < n; ++v) out[v] += w[v] * in[at[v]];
    }
  }

  // Output i of lines that lie `width` apart: a weighted sum of rows.
  void Sum(int64_t i, const float* in, int64_t width, float* out) const {
    const int32_t* at = index + i * taps;
    const float* w = weight + i * taps;
    {
      const float* row = in + at[0] * width;
      const float share = w[0];
#pragma GCC ivdep
      for (int64_t v = 0; v < width; ++v) out[v] = share * row[v];
    }
    for (int64_t t = 1; t < taps; ++t) {
      const float share = w[t];
      if (share == 0) continue;
      const float* row = in + at[t] * width;
#pragma GCC ivdep
      for (int64_t v = 0; v < width; ++v) out[v] += share * row[v];
    }
  }
};

struct Table {
  const int32_t* index;
  const float* weight;
  int64_t taps;
};

// One example; `on` are its chosen channels.
template <typename T>
void Example(const int64_t* size, int64_t channels, const std::vector<int64_t>& on, const std::vector<Axis>& axes,
             float* planes, T* image) {
  const int64_t nx = size[0], ny = size[1], nz = size[2], area = ny * nz, many = on.size();
#pragma omp parallel
  {
    std::vector<float> strip(nx * kColumns), work(area), line(nz);
    // The image's (y, z) plane in strips: each is gathered for all x, one channel after the other, and mapped along x.
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < area; first += kColumns) {
      const int64_t width = std::min(kColumns, area - first);
      for (int64_t q = 0; q < many; ++q) {
        const Axis& along = axes[3 * q];
        float* const plane = planes + q * nx * area + first;
        for (int64_t x = 0; x < nx; ++x) {
          const T* from = image + (x * area + first) * channels + on[q];
          float* to = along.taps ? &strip[x * width] : plane + x * area;
          for (int64_t v = 0; v < width; ++v) to[v] = Load(from[v * channels]);
        }
        if (along.taps) {
          for (int64_t x = 0; x < nx; ++x) along.Sum(x, strip.data(), width, plane + x * area);
        }
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t x = 0; x < nx; ++x) {
      for (int64_t q = 0; q < many; ++q) {
        float* plane = planes + (q * nx + x) * area;
        if (axes[3 * q + 1].taps) {
          for (int64_t y = 0; y < ny; ++y) axes[3 * q + 1].Sum(y, plane, nz, &work[y * nz]);
          plane = work.data();
        }
        T* to = image + x * area * channels + on[q];
        for (int64_t y = 0; y < ny; ++y) {
          const float* row = plane + y * nz;
          if (axes[3 * q + 2].taps) {
            axes[3 * q + 2].Line(row, line.data());
            row = line.data();
          }
          for (int64_t z = 0; z < nz; ++z) Store(row[z], to[(y * nz + z) * channels]);
        }
      }
    }
  }
}

template <typename T>
void Run(const float* gate, const Table* tables, int64_t examples, const int64_t* size, int64_t channels, T* image) {
  const int64_t voxels = size[0] * size[1] * size[2];
  int64_t most = 0;
  for (int64_t n = 0; n < examples; ++n) {
    most = std::max<int64_t>(most, std::count_if(gate + n * channels, gate + (n + 1) * channels,
                                                 [](float g) { return g != 0; }));
  }
  if (most == 0) return;
  float* const planes = static_cast<float*>(Scratch(most * voxels * sizeof(float)));
  for (int64_t n = 0; n < examples; ++n) {
    std::vector<int64_t> on;
    for (int64_t c = 0; c < channels; ++c) {
      if (gate[n * channels + c] != 0) on.push_back(c);
    }
    if (on.empty()) continue;
    std::vector<Axis> axes(3 * on.size());
    for (std::size_t q = 0; q < on.size(); ++q) {
      for (int a = 0; a < 3; ++a) {
        const int64_t at = (n * channels + on[q]) * size[a] * tables[a].taps;
        axes[3 * q + a].Set(tables[a].index + at, tables[a].weight + at, size[a], tables[a].taps);
      }
    }
    Example(size, channels, on, axes, planes, image + n * voxels * channels);
  }
}

using Index = ffi::BufferR4<ffi::S32>;
using Weight = ffi::BufferR4<ffi::F32>;

ffi::Error Separable(ffi::BufferR2<ffi::F32> gate, ffi::AnyBuffer in, Index ix, Weight wx, Index iy, Weight wy, Index iz,
                     Weight wz, ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = in.dimensions();
  const int64_t size[3] = {shape[1], shape[2], shape[3]};
  const Table tables[3] = {{ix.typed_data(), wx.typed_data(), ix.dimensions()[3]},
                           {iy.typed_data(), wy.typed_data(), iy.dimensions()[3]},
                           {iz.typed_data(), wz.typed_data(), iz.dimensions()[3]}};
  if (in.untyped_data() != out->untyped_data()) std::copy_n(static_cast<const char*>(in.untyped_data()), in.size_bytes(),
                                                            static_cast<char*>(out->untyped_data()));
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    try {
      RunOnTeam([&] {
        Run(gate.typed_data(), tables, shape[0], size, shape[4], static_cast<T*>(out->untyped_data()));
      });
      return ffi::Error::Success();
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string("separable: ") + error.what());
    }
  };
  switch (in.element_type()) {
    case ffi::DataType::F32: return run(static_cast<float*>(nullptr));
    case ffi::DataType::BF16: return run(static_cast<BFloat16*>(nullptr));
    default: return ffi::Error(ffi::ErrorCode::kInvalidArgument, "separable: only float32 and bfloat16");
  }
}

}  // namespace
}  // namespace medjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_separable, medjax::Separable,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<medjax::Index>()
                                  .Arg<medjax::Weight>()
                                  .Arg<medjax::Index>()
                                  .Arg<medjax::Weight>()
                                  .Arg<medjax::Index>()
                                  .Arg<medjax::Weight>()
                                  .Ret<xla::ffi::AnyBuffer>());
