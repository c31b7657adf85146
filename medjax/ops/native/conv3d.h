// What the convolution kernels share: the description of a convolution, and the depthwise kernel's entry.
#ifndef MEDJAX_CONV3D_H_
#define MEDJAX_CONV3D_H_

#include <cstdint>
#include <vector>

namespace medjax {

enum class Op : int64_t { kForward, kInputGrad, kFilterGrad };

struct Problem {
  Op op;
  bool bfloat16;  // else float32
  bool bias;
  std::vector<int64_t> image;   // N, X, Y, Z, C of the convolution's input
  std::vector<int64_t> filter;  // KX, KY, KZ, C / groups, F
  std::vector<int64_t> output;  // N, X, Y, Z, F
  std::vector<int64_t> strides, low, high, dilation;
  int64_t groups;
};

struct Pointers {
  void* image;
  void* filter;
  void* output;
  void* bias;
};

// One filter a channel: every channel is convolved on its own.
inline bool IsDepthwise(const Problem& p) {
  return p.groups > 1 && p.groups == p.image[4] && p.groups == p.output[4];
}

// On the team's thread.
void ExecuteDepthwise(const Problem& problem, const Pointers& at);

// Whether minimal filtering applies to the problem and pays on this CPU.
bool IsWinograd(const Problem& problem);

// On the team's thread.
void ExecuteWinograd(const Problem& problem, const Pointers& at);

}  // namespace medjax

#endif  // MEDJAX_CONV3D_H_
