// Instance normalisation followed by a leaky ReLU, forward and backward, and sums over voxels, as XLA FFI handlers.
//
// Images are [N, V, C]: examples, voxels, channels. Both passes are bound by memory, so each reads and writes a tensor
// as few times as the mathematics allows: forward two reads and a write, backward four reads and a write.
//
// A reduction runs over chunks of fixed size, whose partial sums are added in the order of the chunks: the result does
// not depend on the number of threads or on which thread came first.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <omp.h>
#include <string>
#include <utility>
#include <vector>

#include "element.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace medjax {
namespace {

namespace ffi = xla::ffi;

// A chunk fits the first-level cache, as it is read twice.
constexpr int64_t kChunkElements = 4096;
// Loops run over blocks of whole voxels at least this long, whatever the number of channels.
constexpr int64_t kVector = 16, kMinBlock = 128;

// How the voxels of one example are cut.
struct Cut {
  int64_t voxels, channels;
  int64_t block;         // elements of a block: whole voxels, whole vectors
  int64_t chunk;         // voxels of a chunk: whole blocks
  int64_t chunks;        // of an example

  Cut(int64_t voxels, int64_t channels) : voxels(voxels), channels(channels) {
    block = std::lcm(channels, kVector);
    block *= (kMinBlock + block - 1) / block;
    const int64_t block_voxels = block / channels;
    chunk = std::max<int64_t>(1, kChunkElements / block) * block_voxels;
    chunks = (voxels + chunk - 1) / chunk;
  }
  int64_t Size(int64_t k) const { return std::min(chunk, voxels - k * chunk); }
};

// Per-channel values repeated over a block, so that one flat loop serves any number of channels.
void Repeat(const Cut& cut, const float* values, float* block) {
  for (int64_t j = 0; j < cut.block; j += cut.channels) std::copy_n(values, cut.channels, block + j);
}

// The reverse for sums: adds up the voxels of a block.
void Fold(const Cut& cut, const float* block, float* sums) {
  std::fill(sums, sums + cut.channels, 0.0f);
  for (int64_t j = 0; j < cut.block; j += cut.channels) {
    for (int64_t c = 0; c < cut.channels; ++c) sums[c] += block[j + c];
  }
}

// No two of the arrays a loop below walks through overlap; the compiler is told at each (ivdep).

// Calls `body(first, length)` for the blocks of `elements` consecutive elements; the last may be shorter.
template <typename Body>
inline void ForBlocks(const Cut& cut, int64_t elements, const Body& body) {
  int64_t i = 0;
  for (; i + cut.block <= elements; i += cut.block) body(i, cut.block);
  if (i < elements) body(i, elements - i);
}

template <typename T>
void ChunkSum(const Cut& cut, const T* x, int64_t voxels, float* work, float* sums) {
  std::fill(work, work + cut.block, 0.0f);
  ForBlocks(cut, voxels * cut.channels, [&](int64_t i, int64_t length) {
    const T* in = x + i;
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) work[j] += Load(in[j]);
  });
  Fold(cut, work, sums);
}

// Mean of a chunk and sum of squared differences from it, per channel.
template <typename T>
void ChunkMoments(const Cut& cut, const T* x, int64_t voxels, float* work, float* mean, float* squares) {
  const int64_t elements = voxels * cut.channels;
  ChunkSum(cut, x, voxels, work, mean);
  for (int64_t c = 0; c < cut.channels; ++c) mean[c] /= static_cast<float>(voxels);
  float* means = work + cut.block;
  Repeat(cut, mean, means);
  std::fill(work, work + cut.block, 0.0f);
  ForBlocks(cut, elements, [&](int64_t i, int64_t length) {
    const T* in = x + i;
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) {
      const float d = Load(in[j]) - means[j];
      work[j] += d * d;
    }
  });
  Fold(cut, work, squares);
}

template <typename T>
void Normalise(const Cut& cut, const T* x, int64_t voxels, const float* mean, const float* gain, const float* bias,
               float slope, T* y) {
  ForBlocks(cut, voxels * cut.channels, [&](int64_t i, int64_t length) {
    const T* in = x + i;
    T* out = y + i;
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) {
      const float z = (Load(in[j]) - mean[j]) * gain[j] + bias[j];
      Store(z >= 0 ? z : slope * z, out[j]);
    }
  });
}

// Sums over a chunk of the gradient before the activation, and of its product with the centred input.
template <typename T>
void ChunkGradients(const Cut& cut, const T* x, const T* g, int64_t voxels, const float* mean, const float* gain,
                    const float* bias, float slope, float* work, float* plain, float* weighted) {
  std::fill(work, work + 2 * cut.block, 0.0f);
  ForBlocks(cut, voxels * cut.channels, [&](int64_t i, int64_t length) {
    const T* in = x + i;
    const T* up = g + i;
    float* first = work;
    float* second = work + cut.block;
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) {
      const float d = Load(in[j]) - mean[j];
      const float dy = Load(up[j]);
      const float dz = d * gain[j] + bias[j] >= 0 ? dy : slope * dy;
      first[j] += dz;
      second[j] += dz * d;
    }
  });
  Fold(cut, work, plain);
  Fold(cut, work + cut.block, weighted);
}

template <typename T>
void InputGradient(const Cut& cut, const T* x, const T* g, int64_t voxels, const float* mean, const float* gain,
                   const float* bias, const float* plain, const float* weighted, float slope, T* dx) {
  ForBlocks(cut, voxels * cut.channels, [&](int64_t i, int64_t length) {
    const T* in = x + i;
    const T* up = g + i;
    T* out = dx + i;
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) {
      const float d = Load(in[j]) - mean[j];
      const float dy = Load(up[j]);
      const float dz = d * gain[j] + bias[j] >= 0 ? dy : slope * dy;
      Store(gain[j] * (dz - plain[j] - d * weighted[j]), out[j]);
    }
  });
}

std::size_t Bytes(int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); }

template <typename T>
void Forward(const Cut& cut, int64_t examples, const T* x, const float* scale, const float* bias, float slope,
             float eps, T* y, float* mean, float* inverse) {
  const int64_t c = cut.channels, size = cut.voxels * c;
  // Means and squares of every chunk, then per-channel values, then a thread's work.
  const int64_t per_thread = 4 * cut.block;
  float* const partial = static_cast<float*>(Scratch(Bytes(2 * cut.chunks * c + 3 * cut.block + Threads() * per_thread)));
  float* const repeated = partial + 2 * cut.chunks * c;
  float* const spare = repeated + 3 * cut.block;
#pragma omp parallel
  {
    float* const work = spare + omp_get_thread_num() * per_thread;
    for (int64_t n = 0; n < examples; ++n) {
#pragma omp for schedule(static)
      for (int64_t k = 0; k < cut.chunks; ++k) {
        float* at = partial + 2 * k * c;
        ChunkMoments(cut, x + n * size + k * cut.chunk * c, cut.Size(k), work, at, at + c);
      }
#pragma omp single
      {
        std::vector<float> gain(c);
        for (int64_t i = 0; i < c; ++i) {
          double sum = 0, squares = 0;
          for (int64_t k = 0; k < cut.chunks; ++k) sum += partial[2 * k * c + i] * static_cast<double>(cut.Size(k));
          const double centre = sum / static_cast<double>(cut.voxels);
          for (int64_t k = 0; k < cut.chunks; ++k) {
            const double d = partial[2 * k * c + i] - centre;
            squares += partial[(2 * k + 1) * c + i] + d * d * static_cast<double>(cut.Size(k));
          }
          mean[n * c + i] = static_cast<float>(centre);
          inverse[n * c + i] = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(cut.voxels) + eps));
          gain[i] = inverse[n * c + i] * scale[i];
        }
        Repeat(cut, mean + n * c, repeated);
        Repeat(cut, gain.data(), repeated + cut.block);
        Repeat(cut, bias, repeated + 2 * cut.block);
      }
#pragma omp for schedule(static)
      for (int64_t k = 0; k < cut.chunks; ++k) {
        const int64_t at = n * size + k * cut.chunk * c;
        Normalise(cut, x + at, cut.Size(k), repeated, repeated + cut.block, repeated + 2 * cut.block, slope, y + at);
      }
    }
  }
}

template <typename T>
void Backward(const Cut& cut, int64_t examples, const T* x, const T* g, const float* mean, const float* inverse,
              const float* scale, const float* bias, float slope, T* dx, float* dscale, float* dbias) {
  const int64_t c = cut.channels, size = cut.voxels * c;
  const int64_t per_thread = 2 * cut.block;
  float* const partial = static_cast<float*>(Scratch(Bytes(2 * cut.chunks * c + 5 * cut.block + Threads() * per_thread)));
  float* const repeated = partial + 2 * cut.chunks * c;
  float* const spare = repeated + 5 * cut.block;
  float *const centre = repeated, *const gain = centre + cut.block, *const shift = gain + cut.block;
  float *const plain = shift + cut.block, *const weighted = plain + cut.block;
#pragma omp parallel
  {
    float* const work = spare + omp_get_thread_num() * per_thread;
    for (int64_t n = 0; n < examples; ++n) {
#pragma omp single
      {
        std::vector<float> gains(c);
        for (int64_t i = 0; i < c; ++i) gains[i] = inverse[n * c + i] * scale[i];
        Repeat(cut, mean + n * c, centre);
        Repeat(cut, gains.data(), gain);
        Repeat(cut, bias, shift);
      }
#pragma omp for schedule(static)
      for (int64_t k = 0; k < cut.chunks; ++k) {
        const int64_t at = n * size + k * cut.chunk * c;
        float* sums = partial + 2 * k * c;
        ChunkGradients(cut, x + at, g + at, cut.Size(k), centre, gain, shift, slope, work, sums, sums + c);
      }
#pragma omp single
      {
        std::vector<float> means(2 * c);
        for (int64_t i = 0; i < c; ++i) {
          double first = 0, second = 0;
          for (int64_t k = 0; k < cut.chunks; ++k) {
            first += partial[2 * k * c + i];
            second += partial[(2 * k + 1) * c + i];
          }
          const double r = inverse[n * c + i];
          dbias[n * c + i] = static_cast<float>(first);
          dscale[n * c + i] = static_cast<float>(second * r);
          means[i] = static_cast<float>(first / static_cast<double>(cut.voxels));
          means[c + i] = static_cast<float>(second * r * r / static_cast<double>(cut.voxels));
        }
        Repeat(cut, means.data(), plain);
        Repeat(cut, means.data() + c, weighted);
      }
#pragma omp for schedule(static)
      for (int64_t k = 0; k < cut.chunks; ++k) {
        const int64_t at = n * size + k * cut.chunk * c;
        InputGradient(cut, x + at, g + at, cut.Size(k), centre, gain, shift, plain, weighted, slope, dx + at);
      }
    }
  }
}

template <typename T>
void Sum(const Cut& cut, const T* x, float* sums) {
  const int64_t c = cut.channels;
  float* const partial = static_cast<float*>(Scratch(Bytes(cut.chunks * c + Threads() * cut.block)));
  float* const spare = partial + cut.chunks * c;
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < cut.chunks; ++k) {
    ChunkSum(cut, x + k * cut.chunk * c, cut.Size(k), spare + omp_get_thread_num() * cut.block, partial + k * c);
  }
  for (int64_t i = 0; i < c; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < cut.chunks; ++k) sum += partial[k * c + i];
    sums[i] = static_cast<float>(sum);
  }
}

using F32 = ffi::BufferR1<ffi::F32>;
using Table = ffi::Result<ffi::BufferR2<ffi::F32>>;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// Calls `run` with a null pointer of the images' element type, on the team's thread.
template <typename Run>
ffi::Error Dispatch(ffi::DataType type, const Run& run) {
  try {
    switch (type) {
      case ffi::DataType::F32:
        RunOnTeam([&] { run(static_cast<float*>(nullptr)); });
        return ffi::Error::Success();
      case ffi::DataType::BF16:
        RunOnTeam([&] { run(static_cast<BFloat16*>(nullptr)); });
        return ffi::Error::Success();
      default:
        return ffi::Error(ffi::ErrorCode::kInvalidArgument, "instance norm: only float32 and bfloat16");
    }
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("instance norm: ") + error.what());
  }
}

Cut CutOf(const In& x) {
  const auto shape = x.dimensions();
  return Cut(shape[1] * shape[2] * shape[3], shape[4]);
}

ffi::Error NormForward(In x, F32 scale, F32 bias, Out y, Table mean, Table inverse, float slope, float eps) {
  return Dispatch(x.element_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Forward(CutOf(x), x.dimensions()[0], static_cast<const T*>(x.untyped_data()), scale.typed_data(), bias.typed_data(),
            slope, eps, static_cast<T*>(y->untyped_data()), mean->typed_data(), inverse->typed_data());
  });
}

ffi::Error NormBackward(In x, In g, ffi::BufferR2<ffi::F32> mean, ffi::BufferR2<ffi::F32> inverse, F32 scale, F32 bias,
                        Out dx, Table dscale, Table dbias, float slope) {
  return Dispatch(x.element_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backward(CutOf(x), x.dimensions()[0], static_cast<const T*>(x.untyped_data()),
             static_cast<const T*>(g.untyped_data()), mean.typed_data(), inverse.typed_data(), scale.typed_data(),
             bias.typed_data(), slope, static_cast<T*>(dx->untyped_data()), dscale->typed_data(), dbias->typed_data());
  });
}

ffi::Error ChannelSum(In x, ffi::Result<F32> sums) {
  return Dispatch(x.element_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto shape = x.dimensions();
    const Cut cut(shape[0] * shape[1] * shape[2] * shape[3], shape[4]);
    Sum(cut, static_cast<const T*>(x.untyped_data()), sums->typed_data());
  });
}

}  // namespace
}  // namespace medjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_instance_norm, medjax::NormForward,
                              xla::ffi::Ffi::Bind()
                                  .Arg<medjax::In>()
                                  .Arg<medjax::F32>()
                                  .Arg<medjax::F32>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<float>("slope")
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_instance_norm_grad, medjax::NormBackward,
                              xla::ffi::Ffi::Bind()
                                  .Arg<medjax::In>()
                                  .Arg<medjax::In>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<medjax::F32>()
                                  .Arg<medjax::F32>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<float>("slope"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_channel_sum, medjax::ChannelSum,
                              xla::ffi::Ffi::Bind().Arg<medjax::In>().Ret<medjax::F32>());
