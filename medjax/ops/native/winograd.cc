// 3D convolution by minimal filtering (Winograd 1980; Lavin & Gray 2016, "Fast algorithms for convolutional neural
// networks"): F(2, 3) along every axis with three taps, so that a cell of 2x2x2 outputs costs 64 products a pair of
// channels instead of 216. Float32, stride 1, channels in whole vectors; the same transforms serve both gradients.
//
// A cell's 4x4x4 inputs become 64 "points" (Input), the points of many cells are multiplied with the filter's (one small
// matrix product a point), and come back as outputs (Output). The cells of a block stay in the cache from end to end.
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "conv3d.h"
#include "team.h"

namespace medjax {
namespace {

constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline const Vector& At(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline Vector& At(float* p) { return *reinterpret_cast<Vector*>(p); }

// Below these the direct convolution is as fast (measured, AVX-512).
constexpr int64_t kFewestCells = 128;
constexpr double kLeastGain = 1.5;

// Points and outputs of a cell along an axis of K taps; an axis of one tap is left alone.
constexpr int Points(int taps) { return taps == 3 ? 4 : 1; }
constexpr int Outputs(int taps) { return taps == 3 ? 2 : 1; }

#define MEDJAX_INLINE __attribute__((always_inline)) inline

// The four transforms of one axis; `s` apart in memory or registers.
template <int K>
MEDJAX_INLINE void InputAxis(const Vector* d, int s, Vector* v, int t) {
  if constexpr (K == 3) {
    const Vector a = d[0], b = d[s], c = d[2 * s], e = d[3 * s];
    v[0] = a - c;
    v[t] = b + c;
    v[2 * t] = c - b;
    v[3 * t] = b - e;
  } else {
    v[0] = d[0];
  }
}

template <int K>
MEDJAX_INLINE void FilterAxis(const Vector* g, int s, Vector* u, int t) {
  if constexpr (K == 3) {
    const Vector a = g[0], c = g[2 * s], even = (a + c) * 0.5f, odd = g[s] * 0.5f;
    u[0] = a;
    u[t] = even + odd;
    u[2 * t] = even - odd;
    u[3 * t] = c;
  } else {
    u[0] = g[0];
  }
}

template <int K>
MEDJAX_INLINE void OutputAxis(const Vector* m, int s, Vector* y, int t) {
  if constexpr (K == 3) {
    const Vector b = m[s], c = m[2 * s];
    y[0] = m[0] + b + c;
    y[t] = b - c - m[3 * s];
  } else {
    y[0] = m[0];
  }
}

// The transpose of OutputAxis: from outputs' gradients to points.
template <int K>
MEDJAX_INLINE void SpreadAxis(const Vector* y, int s, Vector* m, int t) {
  if constexpr (K == 3) {
    const Vector a = y[0], b = y[s];
    m[0] = a;
    m[t] = a + b;
    m[2 * t] = a - b;
    m[3 * t] = -b;
  } else {
    m[0] = y[0];
  }
}

// The transpose of FilterAxis: from points to taps.
template <int K>
MEDJAX_INLINE void TapsAxis(const Vector* m, int s, Vector* g, int t) {
  if constexpr (K == 3) {
    const Vector even = (m[s] + m[2 * s]) * 0.5f, odd = (m[s] - m[2 * s]) * 0.5f;
    g[0] = m[0] + even;
    g[t] = odd;
    g[2 * t] = even + m[3 * s];
  } else {
    g[0] = m[0];
  }
}

// A correlation: out[o] = sum over taps k of image[o + k - low] * filter[k].
struct Shape {
  int64_t n;
  int64_t in[3], out[3], low[3];
  int64_t channels, features;
  int64_t cells[3];

  int64_t Cells() const { return n * cells[0] * cells[1] * cells[2]; }
};

template <int KX, int KY, int KZ>
class Winograd {
  static constexpr int kX = Points(KX), kY = Points(KY), kZ = Points(KZ);
  static constexpr int kOX = Outputs(KX), kOY = Outputs(KY), kOZ = Outputs(KZ);
  static constexpr int kPlane = kX * kY, kPoints = kPlane * kZ;
  static constexpr int kRows = 12, kColumns = 2;  // of a register block of the products
  // Cells of a block: few enough for their points to stay in the cache, enough to read the filter's points seldom.
  static constexpr int64_t kBlock = 8 * kRows;

 public:
  Winograd(const Shape& shape) : s_(shape) {
    image_step_ = kBlock * s_.channels + kLanes;  // not a multiple of the first-level cache's period
    feature_step_ = kBlock * s_.features + kLanes;
  }

  int64_t FilterFloats() const { return kPoints * s_.channels * s_.features; }
  // Partial sums of the filter's gradient: one a thread, in bounded memory. They are added in order.
  int64_t Parts() const {
    return std::clamp<int64_t>((int64_t{1} << 27) / FilterFloats(), 1, Threads());
  }
  int64_t BlockFloats() const { return kPoints * (image_step_ + feature_step_); }

  // filter [KX, KY, KZ, C, F] -> points [kPoints, panels of features, C, features of the panel]. For an input's gradient
  // the filter is stored as [KX, KY, KZ, F, C] and reversed on the way.
  void Filter(const float* filter, bool gradient, float* points) const {
    constexpr int kTaps = KX * KY * KZ;
    const int64_t c = s_.channels, f = s_.features, step = c * f;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < c; first += kLanes) {
      for (int64_t j = 0; j < f; j += kLanes) {
        Vector square[kTaps][kLanes];  // [tap][channel], lanes are features; of a gradient the other way round
        for (int t = 0; t < kTaps; ++t) {
          for (int64_t i = 0; i < kLanes; ++i) {
            square[t][i] = gradient ? At(filter + (kTaps - 1 - t) * step + (j + i) * c + first)
                                    : At(filter + t * step + (first + i) * f + j);
          }
        }
        for (int64_t i = 0; i < kLanes; ++i) {
          Vector g[kTaps], a[kX * KY * KZ], b[kX * kY * KZ], u[kPoints];
          for (int t = 0; t < kTaps; ++t) {
            if (!gradient) {
              g[t] = square[t][i];
            } else {
              for (int l = 0; l < kLanes; ++l) g[t][l] = square[t][l][i];
            }
          }
          for (int t = 0; t < KY * KZ; ++t) FilterAxis<KX>(g + t, KY * KZ, a + t, KY * KZ);
          for (int x = 0; x < kX; ++x) {
            for (int t = 0; t < KZ; ++t) FilterAxis<KY>(a + x * KY * KZ + t, KZ, b + x * kY * KZ + t, KZ);
          }
          for (int t = 0; t < kPlane; ++t) FilterAxis<KZ>(b + t * KZ, 1, u + t * kZ, 1);
          float* to = points + Panel(j) * c + (first + i) * Width(j) + Within(j);
          for (int p = 0; p < kPoints; ++p) At(to + p * step) = u[p];
        }
      }
    }
  }

  // Forward: image, filter points, bias or null -> output. `scratch`: BlockFloats() a thread.
  void Forward(const float* image, const float* points, const float* bias, float* scratch, float* output) const {
    const int64_t blocks = (s_.Cells() + kBlock - 1) / kBlock;
#pragma omp parallel
    {
      float* const v = scratch + omp_get_thread_num() * BlockFloats();
      float* const m = v + kPoints * image_step_;
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * kBlock, count = std::min(kBlock, s_.Cells() - first);
        Image(image, first, count, v);
        const int64_t rows = (count + kRows - 1) / kRows * kRows;
        for (int p = 0; p < kPoints; ++p) {
          Multiply(v + p * image_step_, rows, points + p * s_.channels * s_.features, m + p * feature_step_);
        }
        Result(m, first, count, bias, output);
      }
    }
  }

  // The filter's gradient: image and output's gradient -> filter [KX, KY, KZ, C, F]. `sums`: FilterFloats() a part.
  void FilterGradient(const float* image, const float* grad, float* scratch, float* sums, float* filter) const {
    const int64_t blocks = (s_.Cells() + kBlock - 1) / kBlock, parts = Parts();
#pragma omp parallel for schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
      float* const v = scratch + part * BlockFloats();
      float* const d = v + kPoints * image_step_;
      float* const sum = sums + part * FilterFloats();
      std::fill(sum, sum + FilterFloats(), 0.0f);
      for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
        const int64_t first = b * kBlock, count = std::min(kBlock, s_.Cells() - first);
        Image(image, first, count, v);
        Spread(grad, first, count, d);
        for (int p = 0; p < kPoints; ++p) {
          Accumulate(v + p * image_step_, d + p * feature_step_, count, sum + p * s_.channels * s_.features);
        }
      }
    }
    const int64_t c = s_.channels, f = s_.features, taps = c * f;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t j = 0; j < f; j += kLanes) {
        Vector u[kPoints], a[KX * kY * kZ], b[KX * KY * kZ], g[KX * KY * KZ];
        for (int p = 0; p < kPoints; ++p) {
          Vector sum = At(sums + p * taps + i * f + j);
          for (int64_t part = 1; part < parts; ++part) sum += At(sums + part * FilterFloats() + p * taps + i * f + j);
          u[p] = sum;
        }
        for (int t = 0; t < kY * kZ; ++t) TapsAxis<KX>(u + t, kY * kZ, a + t, kY * kZ);
        for (int x = 0; x < KX; ++x) {
          for (int t = 0; t < kZ; ++t) TapsAxis<KY>(a + x * kY * kZ + t, kZ, b + x * KY * kZ + t, kZ);
        }
        for (int t = 0; t < KX * KY; ++t) TapsAxis<KZ>(b + t * kZ, 1, g + t * KZ, 1);
        for (int t = 0; t < KX * KY * KZ; ++t) At(filter + t * taps + i * f + j) = g[t];
      }
    }
  }

 private:
  // Features lie in panels of `kColumns` vectors; the last may be narrower.
  int64_t Panel(int64_t j) const { return j / (kColumns * kLanes) * (kColumns * kLanes); }
  int64_t Width(int64_t j) const { return std::min<int64_t>(kColumns * kLanes, s_.features - Panel(j)); }
  int64_t Within(int64_t j) const { return j - Panel(j); }

  struct Cell {
    int64_t n, x, y, z;
  };

  Cell Locate(int64_t index) const {
    const int64_t z = index % s_.cells[2], y = index / s_.cells[2] % s_.cells[1];
    const int64_t rest = index / (s_.cells[2] * s_.cells[1]);
    return {rest / s_.cells[0], rest % s_.cells[0], y, z};
  }

  // The points of cells first, first + 1...: v[point][cell][channel].
  void Image(const float* image, int64_t first, int64_t count, float* v) const {
    const int64_t c = s_.channels;
    for (int64_t done = 0; done < count;) {
      const Cell cell = Locate(first + done);
      const int64_t run = std::min(count - done, s_.cells[2] - cell.z);  // neighbours along z share inputs
      const float* rows[kPlane];
      for (int i = 0; i < kPlane; ++i) {
        const int64_t x = cell.x * kOX + i / kY - s_.low[0], y = cell.y * kOY + i % kY - s_.low[1];
        const bool inside = x >= 0 && x < s_.in[0] && y >= 0 && y < s_.in[1];
        rows[i] = inside ? image + (((cell.n * s_.in[0] + x) * s_.in[1] + y) * s_.in[2]) * c : nullptr;
      }
      const int64_t start = cell.z * kOZ - s_.low[2];
      for (int64_t channel = 0; channel < c; channel += kLanes) {
        Vector columns[kZ * kPlane];  // a ring over z
        for (int k = 0; k < kZ - kOZ; ++k) Column(rows, start + k, channel, columns + (k % kZ) * kPlane);
        float* to = v + done * c + channel;
        for (int64_t r = 0; r < run; ++r) {
          for (int k = kZ - kOZ; k < kZ; ++k) {
            const int64_t z = r * kOZ + k;
            Column(rows, start + z, channel, columns + (z % kZ) * kPlane);
          }
          for (int i = 0; i < kPlane; ++i) {
            Vector d[kZ], out[kZ];
            for (int k = 0; k < kZ; ++k) d[k] = columns[((r * kOZ + k) % kZ) * kPlane + i];
            InputAxis<KZ>(d, 1, out, 1);
            for (int k = 0; k < kZ; ++k) At(to + (i * kZ + k) * image_step_) = out[k];
          }
          to += c;
        }
      }
      done += run;
    }
    for (int64_t r = count; r % kRows; ++r) {  // rows that fill up a register block
      for (int p = 0; p < kPoints; ++p) std::fill_n(v + p * image_step_ + r * c, c, 0.0f);
    }
  }

  // The x and y transforms of one column of inputs.
  MEDJAX_INLINE void Column(const float* const* rows, int64_t z, int64_t channel, Vector* out) const {
    Vector d[kPlane], a[kPlane];
    if (z < 0 || z >= s_.in[2]) {
      for (int i = 0; i < kPlane; ++i) out[i] = Vector{};
      return;
    }
    const int64_t offset = z * s_.channels + channel;
    for (int i = 0; i < kPlane; ++i) d[i] = rows[i] ? At(rows[i] + offset) : Vector{};
    for (int y = 0; y < kY; ++y) InputAxis<KX>(d + y, kY, a + y, kY);
    for (int x = 0; x < kX; ++x) InputAxis<KY>(a + x * kY, 1, out + x * kY, 1);
  }

  // From points to outputs.
  void Result(const float* m, int64_t first, int64_t count, const float* bias, float* output) const {
    const int64_t f = s_.features;
    for (int64_t r = 0; r < count; ++r) {
      const Cell cell = Locate(first + r);
      for (int64_t j = 0; j < f; j += kLanes) {
        const float* from = m + r * f + j;
        Vector planes[kOZ * kPlane];
        for (int i = 0; i < kPlane; ++i) {
          Vector in[kZ], out[kOZ];
          for (int k = 0; k < kZ; ++k) in[k] = At(from + (i * kZ + k) * feature_step_);
          OutputAxis<KZ>(in, 1, out, 1);
          for (int k = 0; k < kOZ; ++k) planes[k * kPlane + i] = out[k];
        }
        const Vector shift = bias ? At(bias + j) : Vector{};
        for (int k = 0; k < kOZ; ++k) {
          const int64_t z = cell.z * kOZ + k;
          if (z >= s_.out[2]) continue;
          Vector a[kOX * kY], y[kOX * kOY];
          for (int t = 0; t < kY; ++t) OutputAxis<KX>(planes + k * kPlane + t, kY, a + t, kY);
          for (int t = 0; t < kOX; ++t) OutputAxis<KY>(a + t * kY, 1, y + t * kOY, 1);
          for (int i = 0; i < kOX * kOY; ++i) {
            const int64_t ox = cell.x * kOX + i / kOY, oy = cell.y * kOY + i % kOY;
            if (ox < s_.out[0] && oy < s_.out[1]) {
              At(output + (((cell.n * s_.out[0] + ox) * s_.out[1] + oy) * s_.out[2] + z) * f + j) = y[i] + shift;
            }
          }
        }
      }
    }
  }

  // The points of the outputs' gradients: d[point][cell][feature].
  void Spread(const float* grad, int64_t first, int64_t count, float* d) const {
    const int64_t f = s_.features;
    for (int64_t r = 0; r < count; ++r) {
      const Cell cell = Locate(first + r);
      for (int64_t j = 0; j < f; j += kLanes) {
        Vector planes[kOZ * kPlane];
        for (int k = 0; k < kOZ; ++k) {
          const int64_t z = cell.z * kOZ + k;
          Vector y[kOX * kOY], a[kX * kOY];
          for (int i = 0; i < kOX * kOY; ++i) {
            const int64_t ox = cell.x * kOX + i / kOY, oy = cell.y * kOY + i % kOY;
            const bool inside = z < s_.out[2] && ox < s_.out[0] && oy < s_.out[1];
            y[i] = inside ? At(grad + (((cell.n * s_.out[0] + ox) * s_.out[1] + oy) * s_.out[2] + z) * f + j) : Vector{};
          }
          for (int t = 0; t < kOY; ++t) SpreadAxis<KX>(y + t, kOY, a + t, kOY);
          for (int t = 0; t < kX; ++t) SpreadAxis<KY>(a + t * kOY, 1, planes + k * kPlane + t * kY, 1);
        }
        float* to = d + r * f + j;
        for (int i = 0; i < kPlane; ++i) {
          Vector in[kOZ], out[kZ];
          for (int k = 0; k < kOZ; ++k) in[k] = planes[k * kPlane + i];
          SpreadAxis<KZ>(in, 1, out, 1);
          for (int k = 0; k < kZ; ++k) At(to + (i * kZ + k) * feature_step_) = out[k];
        }
      }
    }
  }

  // m [rows, F] = v [rows, C] x u [C, F in panels].
  void Multiply(const float* v, int64_t rows, const float* u, float* m) const {
    const int64_t c = s_.channels, f = s_.features;
    for (int64_t j = 0; j < f; j += kColumns * kLanes) {
      const float* panel = u + j * c;
      for (int64_t r = 0; r < rows; r += kRows) {
        if (f - j >= kColumns * kLanes) {
          Block<kColumns>(v + r * c, c, 1, panel, kColumns * kLanes, c, m + r * f + j, f, kRows, false);
        } else {
          Block<1>(v + r * c, c, 1, panel, kLanes, c, m + r * f + j, f, kRows, false);
        }
      }
    }
  }

  // sum [C, F] += v [cells, C] transposed x d [cells, F].
  void Accumulate(const float* v, const float* d, int64_t cells, float* sum) const {
    const int64_t c = s_.channels, f = s_.features;
    for (int64_t j = 0; j < f; j += kColumns * kLanes) {
      for (int64_t i = 0; i < c; i += 8) {
        if (f - j >= kColumns * kLanes) {
          Block<kColumns>(v + i, 1, c, d + j, f, cells, sum + i * f + j, f, 8, true);
        } else {
          Block<1>(v + i, 1, c, d + j, f, cells, sum + i * f + j, f, 8, true);
        }
      }
    }
  }

  template <int Columns>
  MEDJAX_INLINE static void Block(const float* a, int64_t row, int64_t step, const float* b, int64_t next, int64_t depth,
                                  float* out, int64_t pitch, int rows, bool add) {
    if (rows == kRows) {
      Registers<kRows, Columns>(a, row, step, b, next, depth, out, pitch, add);
    } else {
      Registers<8, Columns>(a, row, step, b, next, depth, out, pitch, add);
    }
  }

  // out [Rows, Columns vectors] (+)= sum over k of a[row * i + step * k] * b[next * k].
  template <int Rows, int Columns>
  MEDJAX_INLINE static void Registers(const float* a, int64_t row, int64_t step, const float* b, int64_t next,
                                      int64_t depth, float* out, int64_t pitch, bool add) {
    Vector sum[Rows][Columns];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) sum[i][j] = add ? At(out + i * pitch + j * kLanes) : Vector{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      Vector w[Columns];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) w[j] = At(b + k * next + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const float x = a[i * row + k * step];
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) sum[i][j] += x * w[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) At(out + i * pitch + j * kLanes) = sum[i][j];
    }
  }

  Shape s_;
  int64_t image_step_, feature_step_;
};

// The correlation a problem asks for: of the image, or of the output's gradient with the reversed filter.
Shape Correlation(const Problem& p) {
  const bool gradient = p.op == Op::kInputGrad;
  const auto& in = gradient ? p.output : p.image;
  const auto& out = gradient ? p.image : p.output;
  Shape shape{in[0], {}, {}, {}, in[4], out[4], {}};
  for (int a = 0; a < 3; ++a) {
    shape.in[a] = in[a + 1];
    shape.out[a] = out[a + 1];
    shape.low[a] = gradient ? p.filter[a] - 1 - p.low[a] : p.low[a];
    const int64_t step = Outputs(static_cast<int>(p.filter[a]));
    shape.cells[a] = (shape.out[a] + step - 1) / step;
  }
  return shape;
}

template <int KX, int KY, int KZ>
void Run(const Problem& p, const Pointers& at) {
  const Winograd<KX, KY, KZ> winograd(Correlation(p));
  const int64_t threads = Threads(), filter = winograd.FilterFloats(), block = winograd.BlockFloats();
  float* const image = static_cast<float*>(at.image);
  float* const output = static_cast<float*>(at.output);
  const int64_t kept = p.op == Op::kFilterGrad ? winograd.Parts() * filter : filter;
  float* const scratch = static_cast<float*>(Scratch((kept + threads * block) * sizeof(float)));
  float* const blocks = scratch + kept;
  if (p.op == Op::kFilterGrad) {
    winograd.FilterGradient(image, output, blocks, scratch, static_cast<float*>(at.filter));
    return;
  }
  const bool gradient = p.op == Op::kInputGrad;
  winograd.Filter(static_cast<const float*>(at.filter), gradient, scratch);
  winograd.Forward(gradient ? output : image, scratch, static_cast<const float*>(at.bias), blocks,
                   gradient ? image : output);
}

}  // namespace

bool IsWinograd(const Problem& p) {
#ifndef __AVX512F__
  return false;
#else
  if (p.bfloat16 || p.groups != 1 || p.image[4] % kLanes || p.output[4] % kLanes) return false;
  int threes = 0;
  for (int a = 0; a < 3; ++a) {
    if (p.strides[a] != 1 || p.dilation[a] != 1 || (p.filter[a] != 1 && p.filter[a] != 3)) return false;
    threes += p.filter[a] == 3;
  }
  if (threes < 2) return false;
  // Outputs that only fill up cells, and a filter as large as the image, eat the gain.
  const Shape s = Correlation(p);
  double products = 1, direct = 1;
  for (int a = 0; a < 3; ++a) {
    products *= static_cast<double>(s.cells[a] * Points(static_cast<int>(p.filter[a])));
    direct *= static_cast<double>(s.out[a] * p.filter[a]);
  }
  return s.Cells() >= kFewestCells && direct >= kLeastGain * products;
#endif
}

void ExecuteWinograd(const Problem& p, const Pointers& at) {
  const int64_t *k = p.filter.data();
  if (k[0] == 1) return Run<1, 3, 3>(p, at);
  if (k[1] == 1) return Run<3, 1, 3>(p, at);
  if (k[2] == 1) return Run<3, 3, 1>(p, at);
  Run<3, 3, 3>(p, at);
}

}  // namespace medjax
