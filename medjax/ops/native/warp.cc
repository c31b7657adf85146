// Resampling of volumes through an affine map and a B-spline displacement field, as an XLA FFI handler.
//
// Output voxel o takes the input at p = M (o - c + u(o)) + c + t, where c is the centre of the grid and u a tensor
// product of cubic B-splines over a few control points. Coordinates are made a row (fixed x and y) at a time, so that
// neither they nor the field are ever stored for the whole volume. Outside the input is 0.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

enum Kind { kCopy = 0, kVoxels = 1, kGeneral = 2 };  // of an example: untouched, whole voxels moved, interpolated
enum Mode { kLinear = 0, kNearest = 1, kVote = 2 };

constexpr float kTie = 1e-5f;  // shares of labels closer than this are equal: the lower label wins

// An example's map. `pose` is the kind, M row by row, t.
struct Pose {
  Kind kind;
  float m[3][3], t[3], c[3];

  Pose(const float* pose, const int64_t* size) : kind(static_cast<Kind>(static_cast<int>(pose[0]))) {
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) m[a][b] = pose[1 + 3 * a + b];
      c[a] = (static_cast<float>(size[a]) - 1) / 2;
      t[a] = pose[10 + a];
    }
  }
};

// The displacement field: control points [gx, gy, gz, 3] of one example and the splines' values at the voxels.
struct Field {
  const float* control = nullptr;
  const float *bx = nullptr, *by = nullptr, *bz = nullptr;  // [X, gx], [Y, gy], [gz, Z]
  int64_t gx = 0, gy = 0, gz = 0;
};

struct Row {
  std::vector<float> plane, line, at[3];
  int64_t planes_of = -1;  // the x that `plane` holds

  Row(int64_t nz, const Field& field) : plane(field.gy * field.gz * 3), line(field.gz * 3) {
    for (auto& axis : at) axis.resize(nz);
  }
};

// Input coordinates of row (x, y) into row.at.
void Coordinates(const Pose& pose, const Field& field, int64_t x, int64_t y, int64_t nz, Row& row) {
  float *px = row.at[0].data(), *py = row.at[1].data(), *pz = row.at[2].data();
  const float dx = static_cast<float>(x) - pose.c[0], dy = static_cast<float>(y) - pose.c[1], cz = pose.c[2];
#pragma GCC ivdep
  for (int64_t z = 0; z < nz; ++z) {
    px[z] = dx;
    py[z] = dy;
    pz[z] = static_cast<float>(z) - cz;
  }
  if (field.control != nullptr) {
    const int64_t width = field.gz * 3;
    if (row.planes_of != x) {
      std::fill(row.plane.begin(), row.plane.end(), 0.0f);
      for (int64_t g = 0; g < field.gx; ++g) {
        const float w = field.bx[x * field.gx + g];
        const float* from = field.control + g * field.gy * width;
        if (w != 0) {
          for (int64_t i = 0; i < field.gy * width; ++i) row.plane[i] += w * from[i];
        }
      }
      row.planes_of = x;
    }
    std::fill(row.line.begin(), row.line.end(), 0.0f);
    for (int64_t g = 0; g < field.gy; ++g) {
      const float w = field.by[y * field.gy + g];
      if (w != 0) {
        for (int64_t i = 0; i < width; ++i) row.line[i] += w * row.plane[g * width + i];
      }
    }
    for (int64_t g = 0; g < field.gz; ++g) {
      const float* b = field.bz + g * nz;
      const float ux = row.line[3 * g], uy = row.line[3 * g + 1], uz = row.line[3 * g + 2];
#pragma GCC ivdep
      for (int64_t z = 0; z < nz; ++z) {
        px[z] += b[z] * ux;
        py[z] += b[z] * uy;
        pz[z] += b[z] * uz;
      }
    }
  }
  const auto& m = pose.m;
  const float ox = pose.c[0] + pose.t[0], oy = pose.c[1] + pose.t[1], oz = pose.c[2] + pose.t[2];
#pragma GCC ivdep
  for (int64_t z = 0; z < nz; ++z) {
    const float a = px[z], b = py[z], c = pz[z];
    px[z] = m[0][0] * a + m[0][1] * b + m[0][2] * c + ox;
    py[z] = m[1][0] * a + m[1][1] * b + m[1][2] * c + oy;
    pz[z] = m[2][0] * a + m[2][1] * b + m[2][2] * c + oz;
  }
}

struct Size {
  int64_t n[3], c;
  bool Inside(int64_t i, int64_t j, int64_t k) const {
    return i >= 0 && i < n[0] && j >= 0 && j < n[1] && k >= 0 && k < n[2];
  }
  int64_t At(int64_t i, int64_t j, int64_t k) const { return ((i * n[1] + j) * n[2] + k) * c; }
};

// Keeps a coordinate where the conversion to an integer is defined; what is so far off is outside anyway. NaN goes out.
inline float Bounded(float p) { return p > -1e6f ? (p < 1e6f ? p : 1e6f) : -1e6f; }

// A row of whole voxels moved: M is diagonal, ±1.
template <typename T>
void MoveRow(const Size& size, const Pose& pose, const T* in, int64_t x, int64_t y, T* out) {
  int64_t from[2];
  const int64_t at[2] = {x, y};
  for (int a = 0; a < 2; ++a) {
    from[a] = std::lrint(Bounded(pose.m[a][a] * (static_cast<float>(at[a]) - pose.c[a]) + pose.c[a] + pose.t[a]));
  }
  const int64_t nz = size.n[2], c = size.c;
  if (!size.Inside(from[0], from[1], 0)) {
    std::fill(out, out + nz * c, T{});
    return;
  }
  const T* line = in + size.At(from[0], from[1], 0);
  const int64_t first = std::lrint(Bounded(-pose.m[2][2] * pose.c[2] + pose.c[2] + pose.t[2]));
  const int64_t step = pose.m[2][2] < 0 ? -1 : 1;
  if (first == 0 && step == 1) {
    std::memcpy(out, line, nz * c * sizeof(T));
    return;
  }
  const auto move = [&](auto c) {  // a voxel's channels, in number known when compiling or not
    for (int64_t z = 0; z < nz; ++z) {
      const int64_t k = first + step * z;
      if (k < 0 || k >= nz) {
        std::fill(out + z * c, out + (z + 1) * c, T{});
      } else {
        std::memcpy(out + z * c, line + k * c, c * sizeof(T));
      }
    }
  };
  switch (c) {
    case 1: return move(std::integral_constant<int64_t, 1>{});
    case 2: return move(std::integral_constant<int64_t, 2>{});
    case 4: return move(std::integral_constant<int64_t, 4>{});
    default: return move(c);
  }
}

// `C` channels, known when compiling; 0: any number.
template <int C, typename T>
void LinearRow(const Size& size, const Row& row, const T* in, T* out) {
  const int64_t c = C ? C : size.c, sy = size.n[2] * c, sx = size.n[1] * sy;
  for (int64_t z = 0; z < size.n[2]; ++z, out += c) {
    const float px = Bounded(row.at[0][z]), py = Bounded(row.at[1][z]), pz = Bounded(row.at[2][z]);
    const float lx = std::floor(px), ly = std::floor(py), lz = std::floor(pz);
    const float fx = px - lx, fy = py - ly, fz = pz - lz;
    const int64_t i = static_cast<int64_t>(lx), j = static_cast<int64_t>(ly), k = static_cast<int64_t>(lz);
    const float w00 = (1 - fx) * (1 - fy), w01 = (1 - fx) * fy, w10 = fx * (1 - fy), w11 = fx * fy;
    const float gz = 1 - fz;
    if (size.Inside(i, j, k) && size.Inside(i + 1, j + 1, k + 1)) {
      const T* p = in + size.At(i, j, k);
      if (C) {
        float sum[2 * (C ? C : 1)];
#pragma GCC unroll 16
        for (int64_t q = 0; q < 2 * C; ++q) {
          sum[q] = w00 * Load(p[q]) + w01 * Load(p[sy + q]) + w10 * Load(p[sx + q]) + w11 * Load(p[sx + sy + q]);
        }
#pragma GCC unroll 8
        for (int64_t q = 0; q < C; ++q) Store(gz * sum[q] + fz * sum[C + q], out[q]);
      } else {
#pragma GCC ivdep
        for (int64_t q = 0; q < c; ++q) {
          const T* r = p + q;
          const float low = w00 * Load(r[0]) + w01 * Load(r[sy]) + w10 * Load(r[sx]) + w11 * Load(r[sx + sy]);
          r += c;
          const float high = w00 * Load(r[0]) + w01 * Load(r[sy]) + w10 * Load(r[sx]) + w11 * Load(r[sx + sy]);
          Store(gz * low + fz * high, out[q]);
        }
      }
      continue;
    }
    if (i < -1 || i >= size.n[0] || j < -1 || j >= size.n[1] || k < -1 || k >= size.n[2]) {
      std::fill(out, out + c, T{});
      continue;
    }
    for (int64_t q = 0; q < c; ++q) {
      float sum = 0;
      for (int corner = 0; corner < 8; ++corner) {
        const int64_t a = i + (corner >> 2), b = j + (corner >> 1 & 1), d = k + (corner & 1);
        if (!size.Inside(a, b, d)) continue;
        const float w = corner >> 2 ? (corner >> 1 & 1 ? w11 : w10) : (corner >> 1 & 1 ? w01 : w00);
        sum += w * (corner & 1 ? fz : gz) * Load(in[size.At(a, b, d) + q]);
      }
      Store(sum, out[q]);
    }
  }
}

template <typename T>
void NearestRow(const Size& size, const Row& row, const T* in, T* out) {
  for (int64_t z = 0; z < size.n[2]; ++z) {
    const int64_t i = static_cast<int64_t>(std::nearbyint(Bounded(row.at[0][z])));
    const int64_t j = static_cast<int64_t>(std::nearbyint(Bounded(row.at[1][z])));
    const int64_t k = static_cast<int64_t>(std::nearbyint(Bounded(row.at[2][z])));
    out[z] = size.Inside(i, j, k) ? in[size.At(i, j, k)] : T{};
  }
}

// Each label's indicator is interpolated linearly; the label with the largest share wins.
template <typename T>
void VoteRow(const Size& size, const Row& row, const T* in, T* out) {
  const int64_t sy = size.n[2], sx = size.n[1] * sy;
  for (int64_t z = 0; z < size.n[2]; ++z) {
    const float px = Bounded(row.at[0][z]), py = Bounded(row.at[1][z]), pz = Bounded(row.at[2][z]);
    const float lx = std::floor(px), ly = std::floor(py), lz = std::floor(pz);
    const int64_t i = static_cast<int64_t>(lx), j = static_cast<int64_t>(ly), k = static_cast<int64_t>(lz);
    T label[8];
    if (size.Inside(i, j, k) && size.Inside(i + 1, j + 1, k + 1)) {
      const T* p = in + size.At(i, j, k);
      for (int q = 0; q < 8; ++q) label[q] = p[(q >> 2) * sx + (q >> 1 & 1) * sy + (q & 1)];
    } else {
      for (int q = 0; q < 8; ++q) {
        const int64_t a = i + (q >> 2), b = j + (q >> 1 & 1), c = k + (q & 1);
        label[q] = size.Inside(a, b, c) ? in[size.At(a, b, c)] : T{};
      }
    }
    bool same = true;
    for (int q = 1; q < 8; ++q) same &= label[q] == label[0];
    if (same) {
      out[z] = label[0];
      continue;
    }
    const float fx = px - lx, fy = py - ly, fz = pz - lz;
    float share[8], top = 0;
    for (int q = 0; q < 8; ++q) {
      share[q] = 0;
      for (int r = 0; r < 8; ++r) {
        if (label[r] != label[q]) continue;
        share[q] += (r >> 2 ? fx : 1 - fx) * (r >> 1 & 1 ? fy : 1 - fy) * (r & 1 ? fz : 1 - fz);
      }
      top = std::max(top, share[q]);
    }
    bool found = false;
    T best{};
    for (int q = 0; q < 8; ++q) {
      if (share[q] >= top - kTie && (!found || label[q] < best)) {
        best = label[q];
        found = true;
      }
    }
    out[z] = best;
  }
}

template <typename T>
void InterpolateRow(Mode mode, const Size& size, const Row& row, const T* in, T* out) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>) {
    switch (size.c) {
      case 1: return LinearRow<1>(size, row, in, out);
      case 2: return LinearRow<2>(size, row, in, out);
      case 4: return LinearRow<4>(size, row, in, out);
      default: return LinearRow<0>(size, row, in, out);
    }
  } else {
    if (mode == kNearest) return NearestRow(size, row, in, out);
    return VoteRow(size, row, in, out);
  }
}

template <typename T>
void Run(Mode mode, int64_t examples, const Size& size, const float* poses, Field field, const T* in, T* out) {
  const int64_t nx = size.n[0], ny = size.n[1], nz = size.n[2], voxels = nx * ny * nz;
  const float* const control = field.control;
  std::vector<float> across;  // the splines along z, voxels last
  if (control != nullptr) {
    across.resize(field.gz * nz);
    for (int64_t z = 0; z < nz; ++z) {
      for (int64_t g = 0; g < field.gz; ++g) across[g * nz + z] = field.bz[z * field.gz + g];
    }
    field.bz = across.data();
  }
#pragma omp parallel
  {
    Field own = field;
    Row row(nz, own);
    for (int64_t n = 0; n < examples; ++n) {
      const Pose pose(poses + 13 * n, size.n);
      if (control != nullptr) own.control = control + n * own.gx * own.gy * own.gz * 3;
      row.planes_of = -1;
      const T* from = in + n * voxels * size.c;
      T* to = out + n * voxels * size.c;
#pragma omp for schedule(dynamic, 2)
      for (int64_t x = 0; x < nx; ++x) {
        if (pose.kind == kCopy) {
          const int64_t plane = ny * nz * size.c;
          std::memcpy(to + x * plane, from + x * plane, plane * sizeof(T));
          continue;
        }
        for (int64_t y = 0; y < ny; ++y) {
          T* line = to + size.At(x, y, 0);
          if (pose.kind == kVoxels) {
            MoveRow(size, pose, from, x, y, line);
          } else {
            Coordinates(pose, own, x, y, nz, row);
            InterpolateRow(mode, size, row, from, line);
          }
        }
      }
    }
  }
}

ffi::Error Warp(ffi::BufferR2<ffi::F32> pose, ffi::AnyBuffer in, ffi::RemainingArgs rest,
                ffi::Result<ffi::AnyBuffer> out, int32_t mode) {
  const auto shape = in.dimensions();
  const Size size{{shape[1], shape[2], shape[3]}, shape.size() == 5 ? shape[4] : 1};
  Field field;
  if (rest.size() == 4) {
    auto control = rest.get<ffi::AnyBuffer>(0), bx = rest.get<ffi::AnyBuffer>(1), by = rest.get<ffi::AnyBuffer>(2),
         bz = rest.get<ffi::AnyBuffer>(3);
    if (!control || !bx || !by || !bz) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "warp: operands");
    const auto points = control->dimensions();
    field.gx = points[1];
    field.gy = points[2];
    field.gz = points[3];
    field.control = static_cast<const float*>(control->untyped_data());
    field.bx = static_cast<const float*>(bx->untyped_data());
    field.by = static_cast<const float*>(by->untyped_data());
    field.bz = static_cast<const float*>(bz->untyped_data());
  }
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    try {
      RunOnTeam([&] {
        Run(static_cast<Mode>(mode), shape[0], size, pose.typed_data(), field,
            static_cast<const T*>(in.untyped_data()), static_cast<T*>(out->untyped_data()));
      });
      return ffi::Error::Success();
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string("warp: ") + error.what());
    }
  };
  switch (in.element_type()) {
    case ffi::DataType::F32: return run(static_cast<float*>(nullptr));
    case ffi::DataType::BF16: return run(static_cast<BFloat16*>(nullptr));
    case ffi::DataType::U8: return run(static_cast<uint8_t*>(nullptr));
    case ffi::DataType::S8: return run(static_cast<int8_t*>(nullptr));
    case ffi::DataType::U16: return run(static_cast<uint16_t*>(nullptr));
    case ffi::DataType::S16: return run(static_cast<int16_t*>(nullptr));
    case ffi::DataType::S32: return run(static_cast<int32_t*>(nullptr));
    default: return ffi::Error(ffi::ErrorCode::kInvalidArgument, "warp: no such element type");
  }
}

}  // namespace
}  // namespace medjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_warp, medjax::Warp,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("mode"));
