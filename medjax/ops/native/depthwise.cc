// Depthwise 3D convolution and its gradients. oneDNN has fast kernels for one and two dimensions only.
//
// Images are first copied into rows along z that are wide in float32, padded by zeros in z and to whole vectors of
// channels; the loops over them then have no borders. Borders in x and y are left out by the loops.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv3d.h"
#include "element.h"
#include "team.h"

namespace medjax {
namespace {

constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline const Vector& At(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline Vector& At(float* p) { return *reinterpret_cast<Vector*>(p); }

int64_t WholeVectors(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// Images as the loops want them: [N, X, Y, width, channels].
struct Rows {
  int64_t n, x, y;
  int64_t left, step, width;  // element z of a row lies at left + z * step
  int64_t channels;           // whole vectors

  int64_t Row() const { return width * channels; }
  int64_t Floats() const { return n * x * y * Row(); }
};

template <typename T>
void Fill(const Rows& rows, const T* image, int64_t z, int64_t channels, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows.n * rows.x * rows.y; ++i) {
    float* const row = out + i * rows.Row();
    std::fill(row, row + rows.Row(), 0.0f);
    for (int64_t k = 0; k < z; ++k) {
      const T* in = image + (i * z + k) * channels;
      float* to = row + (rows.left + k * rows.step) * rows.channels;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) to[c] = Load(in[c]);
    }
  }
}

// A filter [taps, C] widened and padded; `flip` reverses it along z.
template <typename T>
void FillFilter(const Problem& p, const T* filter, bool flip, int64_t channels, float* out) {
  const int64_t depth = p.filter[2], c = p.filter[4];
  for (int64_t tap = 0; tap < p.filter[0] * p.filter[1] * depth; ++tap) {
    const int64_t k = tap % depth;
    float* to = out + (flip ? tap - k + depth - 1 - k : tap) * channels;
    for (int64_t i = 0; i < channels; ++i) to[i] = i < c ? Load(filter[tap * c + i]) : 0.0f;
  }
}

// `Width` neighbouring outputs of a row for one vector of channels, summed over all taps.
template <int Width>
inline void Outputs(const std::vector<std::pair<const float*, const float*>>& taps, int64_t depth, int64_t stride,
                    int64_t dilation, int64_t channels, Vector start, Vector* sums) {
  Vector sum[Width];
  for (int j = 0; j < Width; ++j) sum[j] = start;
  for (const auto& [row, weights] : taps) {
    for (int64_t k = 0; k < depth; ++k) {
      const Vector w = At(weights + k * channels);
      const float* in = row + k * dilation * channels;
      for (int j = 0; j < Width; ++j) sum[j] += At(in + j * stride * channels) * w;
    }
  }
  for (int j = 0; j < Width; ++j) sums[j] = sum[j];
}

// The same for filters of `Depth` adjacent taps and outputs: every input is loaded once, the filter's row stays in
// registers.
template <int Width, int Depth>
inline void DenseOutputs(const std::vector<std::pair<const float*, const float*>>& taps, int64_t channels, Vector start,
                         Vector* sums) {
  Vector sum[Width];
  for (int j = 0; j < Width; ++j) sum[j] = start;
  for (const auto& [row, weights] : taps) {
    Vector w[Depth];
    for (int k = 0; k < Depth; ++k) w[k] = At(weights + k * channels);
#pragma GCC unroll 32
    for (int i = 0; i < Width + Depth - 1; ++i) {
      const Vector in = At(row + i * channels);
#pragma GCC unroll 32
      for (int k = 0; k < Depth; ++k) {
        if (i - k >= 0 && i - k < Width) sum[i - k] += in * w[k];
      }
    }
  }
  for (int j = 0; j < Width; ++j) sums[j] = sum[j];
}

// Forward, and the gradient of the input: for every output row, correlates the rows under the filter with it. `source`
// maps (output position, tap) of an axis to the position of the row, or -1.
template <typename T, typename Source>
void Correlate(const Problem& p, const Rows& rows, const float* images, const float* filter, const float* bias,
               const std::vector<int64_t>& shape, int64_t start, int64_t stride, const Source& source, T* out) {
  constexpr int kWidth = 8;
  const int64_t x = shape[1], y = shape[2], z = shape[3], c = shape[4], wide = rows.channels, depth = p.filter[2];
#pragma omp parallel
  {
    std::vector<std::pair<const float*, const float*>> taps, shifted;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < shape[0] * x * y; ++i) {
      const int64_t n = i / (x * y), ix = i / y % x, iy = i % y;
      taps.clear();
      for (int64_t a = 0; a < p.filter[0]; ++a) {
        const int64_t sx = source(0, ix, a);
        if (sx < 0) continue;
        for (int64_t b = 0; b < p.filter[1]; ++b) {
          const int64_t sy = source(1, iy, b);
          if (sy < 0) continue;
          taps.emplace_back(images + ((n * rows.x + sx) * rows.y + sy) * rows.Row() + start * wide,
                            filter + (a * p.filter[1] + b) * depth * wide);
        }
      }
      for (int64_t v = 0; v < wide; v += kLanes) {
        for (int64_t k = 0; k < z; k += kWidth) {
          shifted.clear();
          for (const auto& [row, weights] : taps) shifted.emplace_back(row + k * stride * wide + v, weights + v);
          const int64_t count = std::min<int64_t>(kWidth, z - k);
          Vector sums[kWidth];
          const Vector first = bias ? At(bias + v) : Vector{};
          const int64_t d = p.dilation[2];
          const bool dense = count == kWidth && stride == 1 && d == 1;
          if (dense && depth == 3) {
            DenseOutputs<kWidth, 3>(shifted, wide, first, sums);
          } else if (dense && depth == 5) {
            DenseOutputs<kWidth, 5>(shifted, wide, first, sums);
          } else if (dense && depth == 7) {
            DenseOutputs<kWidth, 7>(shifted, wide, first, sums);
          } else if (count == kWidth) {
            Outputs<kWidth>(shifted, depth, stride, d, wide, first, sums);
          } else {
            for (int64_t j = 0; j < count; ++j) {
              Outputs<1>(shifted, depth, stride, d, wide, first, sums + j);
              for (auto& [row, weights] : shifted) row += stride * wide;
            }
          }
          for (int64_t j = 0; j < count; ++j) {
            T* to = out + ((i * z) + k + j) * c + v;
            for (int64_t l = 0; l < std::min(kLanes, c - v); ++l) Store(sums[j][l], to[l]);
          }
        }
      }
    }
  }
}

// `Taps` neighbouring taps of a filter's row for one vector of channels, summed over a row of outputs.
template <int Taps>
inline void RowProducts(const float* image, const float* output, int64_t z, int64_t stride, int64_t dilation,
                        int64_t channels, float* sums) {
  Vector sum[Taps];
  for (int j = 0; j < Taps; ++j) sum[j] = At(sums + j * channels);
  for (int64_t k = 0; k < z; ++k) {
    const Vector g = At(output + k * channels);
    const float* in = image + k * stride * channels;
    for (int j = 0; j < Taps; ++j) sum[j] += At(in + j * dilation * channels) * g;
  }
  for (int j = 0; j < Taps; ++j) At(sums + j * channels) = sum[j];
}

// The gradient of the filter. The slabs of x of the output are dealt to a fixed number of partial sums, which are added
// in order: the result does not depend on the threads.
template <typename T>
void FilterGradient(const Problem& p, const Rows& rows, const float* images, const Rows& outputs, const float* grads,
                    float* partial, int64_t parts, T* filter) {
  const int64_t slabs = outputs.n * outputs.x, depth = p.filter[2], wide = rows.channels, c = p.filter[4];
  const int64_t taps = p.filter[0] * p.filter[1] * depth;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t part = 0; part < parts; ++part) {
    float* const sums = partial + part * taps * wide;
    std::fill(sums, sums + taps * wide, 0.0f);
    for (int64_t slab = slabs * part / parts; slab < slabs * (part + 1) / parts; ++slab) {
      const int64_t n = slab / outputs.x, ox = slab % outputs.x;
      for (int64_t v = 0; v < wide; v += kLanes) {
        for (int64_t a = 0; a < p.filter[0]; ++a) {
          const int64_t ix = ox * p.strides[0] + a * p.dilation[0] - p.low[0];
          if (ix < 0 || ix >= rows.x) continue;
          for (int64_t b = 0; b < p.filter[1]; ++b) {
            float* const to = sums + (a * p.filter[1] + b) * depth * wide + v;
            for (int64_t oy = 0; oy < outputs.y; ++oy) {
              const int64_t iy = oy * p.strides[1] + b * p.dilation[1] - p.low[1];
              if (iy < 0 || iy >= rows.y) continue;
              const float* image = images + ((n * rows.x + ix) * rows.y + iy) * rows.Row() + v;
              const float* grad = grads + ((n * outputs.x + ox) * outputs.y + oy) * outputs.Row() + v;
              const int64_t d = p.dilation[2];
              int64_t k = 0;
              for (; k + 7 <= depth; k += 7) {
                RowProducts<7>(image + k * d * wide, grad, outputs.width, p.strides[2], d, wide, to + k * wide);
              }
              for (; k + 3 <= depth; k += 3) {
                RowProducts<3>(image + k * d * wide, grad, outputs.width, p.strides[2], d, wide, to + k * wide);
              }
              for (; k < depth; ++k) {
                RowProducts<1>(image + k * d * wide, grad, outputs.width, p.strides[2], d, wide, to + k * wide);
              }
            }
          }
        }
      }
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t i = 0; i < c; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[(part * taps + tap) * wide + i];
      Store(static_cast<float>(sum), filter[tap * c + i]);
    }
  }
}

template <typename T>
void Run(const Problem& p, const Pointers& at) {
  const auto &in = p.image, &out = p.output;
  const int64_t c = in[4], wide = WholeVectors(c), taps = p.filter[0] * p.filter[1] * p.filter[2];
  const int64_t reach = (p.filter[2] - 1) * p.dilation[2];
  T* const image = static_cast<T*>(at.image);
  T* const filter = static_cast<T*>(at.filter);
  T* const output = static_cast<T*>(at.output);
  const auto bytes = [](int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); };

  if (p.op == Op::kInputGrad) {
    // With the outputs `stride` apart, the input's gradient is a correlation with the flipped filter.
    const int64_t left = std::max<int64_t>(reach - p.low[2], 0), start = std::max<int64_t>(p.low[2] - reach, 0);
    Rows rows{out[0], out[1], out[2], left, p.strides[2], 0, wide};
    rows.width = std::max(left + (out[3] - 1) * p.strides[2] + 1, start + in[3] + reach);
    float* const grads = static_cast<float*>(Scratch(bytes(rows.Floats() + taps * wide)));
    float* const weights = grads + rows.Floats();
    Fill(rows, output, out[3], c, grads);
    FillFilter(p, filter, /*flip=*/true, wide, weights);
    const auto source = [&](int axis, int64_t position, int64_t tap) {
      const int64_t spread = position + p.low[axis] - tap * p.dilation[axis];
      if (spread < 0 || spread % p.strides[axis]) return int64_t{-1};
      const int64_t row = spread / p.strides[axis];
      return row < out[axis + 1] ? row : int64_t{-1};
    };
    Correlate(p, rows, grads, weights, nullptr, in, start, 1, source, image);
    return;
  }

  Rows rows{in[0], in[1], in[2], p.low[2], 1, 0, wide};
  rows.width = std::max(p.low[2] + in[3], (out[3] - 1) * p.strides[2] + reach + 1);
  if (p.op == Op::kForward) {
    float* const images = static_cast<float*>(Scratch(bytes(rows.Floats() + (taps + 1) * wide)));
    float* const weights = images + rows.Floats();
    float* const bias = weights + taps * wide;
    Fill(rows, image, in[3], c, images);
    FillFilter(p, filter, /*flip=*/false, wide, weights);
    for (int64_t i = 0; i < wide; ++i) bias[i] = p.bias && i < c ? Load(static_cast<T*>(at.bias)[i]) : 0.0f;
    const auto source = [&](int axis, int64_t position, int64_t tap) {
      const int64_t row = position * p.strides[axis] + tap * p.dilation[axis] - p.low[axis];
      return row >= 0 && row < in[axis + 1] ? row : int64_t{-1};
    };
    Correlate(p, rows, images, weights, bias, out, 0, p.strides[2], source, output);
    return;
  }

  const Rows outputs{out[0], out[1], out[2], 0, 1, out[3], wide};
  const int64_t parts = std::min<int64_t>(out[0] * out[1], 64);
  float* const images = static_cast<float*>(Scratch(bytes(rows.Floats() + outputs.Floats() + parts * taps * wide)));
  float* const grads = images + rows.Floats();
  Fill(rows, image, in[3], c, images);
  Fill(outputs, output, out[3], c, grads);
  FilterGradient(p, rows, images, outputs, grads, grads + outputs.Floats(), parts, filter);
}

}  // namespace

void ExecuteDepthwise(const Problem& problem, const Pointers& at) {
  if (problem.bfloat16) {
    Run<BFloat16>(problem, at);
  } else {
    Run<float>(problem, at);
  }
}

}  // namespace medjax
