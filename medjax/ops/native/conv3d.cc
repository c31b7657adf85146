// 3D convolution and its two gradients by oneDNN, as XLA FFI handlers.
//
// Images and their gradients are [N, X, Y, Z, C] on both sides; filters are [KX, KY, KZ, C / groups, F] for XLA and
// reordered here to the blocked format oneDNN prefers (they are small). All three share one set of attributes.
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "conv3d.h"
#include "dnnl.hpp"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace medjax {
namespace {

namespace ffi = xla::ffi;
using dnnl::memory;
using Dims = memory::dims;
using Ints = ffi::Span<const int64_t>;

// What a primitive depends on, as a flat list of numbers: the key of the cache.
std::vector<int64_t> Key(const Problem& p) {
  std::vector<int64_t> key = {static_cast<int64_t>(p.op), p.bfloat16, p.bias, p.groups};
  for (const Dims* part : {&p.image, &p.filter, &p.output, &p.strides, &p.low, &p.high, &p.dilation}) {
    key.insert(key.end(), part->begin(), part->end());
  }
  return key;
}

memory::data_type Type(const Problem& p) { return p.bfloat16 ? memory::data_type::bf16 : memory::data_type::f32; }

dnnl::engine& Engine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory::desc ImageDesc(const Dims& shape, memory::data_type type) {
  return {{shape[0], shape[4], shape[1], shape[2], shape[3]}, type, memory::format_tag::ndhwc};
}

Dims FilterDims(const Problem& p) {
  const Dims& f = p.filter;
  if (p.groups == 1) return {f[4], f[3], f[0], f[1], f[2]};
  return {p.groups, f[4] / p.groups, f[3], f[0], f[1], f[2]};
}

// The filter as XLA holds it: row-major [KX, KY, KZ, C / groups, F].
memory::desc FilterDesc(const Problem& p) {
  const Dims& f = p.filter;
  const int64_t c = f[4], z = f[3] * c, y = f[2] * z, x = f[1] * y;
  if (p.groups == 1) return {FilterDims(p), Type(p), Dims{1, c, x, y, z}};
  return {FilterDims(p), Type(p), Dims{f[4] / p.groups, 1, c, x, y, z}};
}

constexpr std::size_t kAlign = 4096;
std::size_t Padded(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// A convolution made ready: the primitive, and the reorder of the filter on its way in or out.
struct Prepared {
  dnnl::primitive convolution;
  memory::desc image, filter, output, bias, scratch;
  memory::desc outer_filter;
  std::optional<dnnl::reorder> reorder;
  std::size_t filter_bytes = 0, scratch_bytes = 0;
};

template <typename PrimitiveDesc>
void Keep(Prepared& ready, const PrimitiveDesc& pd, bool filter_out) {
  ready.filter = filter_out ? pd.diff_weights_desc() : pd.weights_desc();
  ready.scratch = pd.scratchpad_desc();
  ready.scratch_bytes = Padded(ready.scratch.get_size());
  if (ready.filter == ready.outer_filter) return;
  ready.filter_bytes = Padded(ready.filter.get_size());
  const dnnl::engine& engine = Engine();
  ready.reorder = filter_out ? dnnl::reorder({engine, ready.filter, engine, ready.outer_filter})
                             : dnnl::reorder({engine, ready.outer_filter, engine, ready.filter});
}

Prepared Prepare(const Problem& p) {
  using dnnl::algorithm;
  using dnnl::prop_kind;
  constexpr auto kDirect = algorithm::convolution_direct;
  const dnnl::engine& engine = Engine();
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  // Not the process-wide default, which an environment variable may have set to a lower precision.
  attr.set_fpmath_mode(dnnl::fpmath_mode::strict);

  Prepared ready;
  ready.image = ImageDesc(p.image, Type(p));
  ready.output = ImageDesc(p.output, Type(p));
  ready.outer_filter = FilterDesc(p);
  if (p.bias) ready.bias = memory::desc({p.filter[4]}, Type(p), memory::format_tag::x);
  // Sums over a whole volume are kept in float32 until the reorder rounds them.
  const auto filter_type = p.op == Op::kFilterGrad ? memory::data_type::f32 : Type(p);
  const memory::desc filter(FilterDims(p), filter_type, memory::format_tag::any);
  Dims dilation;
  for (int64_t d : p.dilation) dilation.push_back(d - 1);  // oneDNN counts the gaps

  if (p.op == Op::kForward) {
    const auto kind = prop_kind::forward_inference;
    const auto pd = p.bias ? dnnl::convolution_forward::primitive_desc(engine, kind, kDirect, ready.image, filter,
                                                                       ready.bias, ready.output, p.strides, dilation,
                                                                       p.low, p.high, attr)
                           : dnnl::convolution_forward::primitive_desc(engine, kind, kDirect, ready.image, filter,
                                                                       ready.output, p.strides, dilation, p.low,
                                                                       p.high, attr);
    Keep(ready, pd, /*filter_out=*/false);
    ready.convolution = dnnl::convolution_forward(pd);
    return ready;
  }
  // The gradients' descriptors want a forward one as a hint; only its formats matter.
  const memory::desc hint(FilterDims(p), Type(p), memory::format_tag::any);
  const dnnl::convolution_forward::primitive_desc forward(engine, prop_kind::forward_training, kDirect, ready.image,
                                                          hint, ready.output, p.strides, dilation, p.low, p.high);
  if (p.op == Op::kInputGrad) {
    const dnnl::convolution_backward_data::primitive_desc pd(engine, kDirect, ready.image, filter, ready.output,
                                                             p.strides, dilation, p.low, p.high, forward, attr);
    Keep(ready, pd, /*filter_out=*/false);
    ready.convolution = dnnl::convolution_backward_data(pd);
  } else {
    const dnnl::convolution_backward_weights::primitive_desc pd(engine, kDirect, ready.image, filter, ready.output,
                                                                p.strides, dilation, p.low, p.high, forward, attr);
    Keep(ready, pd, /*filter_out=*/true);
    ready.convolution = dnnl::convolution_backward_weights(pd);
  }
  return ready;
}

// On the team's thread.
void Execute(const Problem& problem, const Pointers& at) {
  static std::map<std::vector<int64_t>, std::unique_ptr<Prepared>> cache;
  static dnnl::stream stream(Engine());
  auto& slot = cache[Key(problem)];
  if (slot == nullptr) slot = std::make_unique<Prepared>(Prepare(problem));
  const Prepared& ready = *slot;

  const dnnl::engine& engine = Engine();
  char* scratch = static_cast<char*>(Scratch(ready.filter_bytes + ready.scratch_bytes));
  const memory image(ready.image, engine, at.image), output(ready.output, engine, at.output);
  memory outer(ready.outer_filter, engine, at.filter);
  memory filter = ready.reorder ? memory(ready.filter, engine, scratch) : outer;
  const memory spare(ready.scratch, engine, scratch + ready.filter_bytes);

  std::unordered_map<int, memory> args = {{DNNL_ARG_SCRATCHPAD, spare}};
  switch (problem.op) {
    case Op::kForward:
      args.insert({{DNNL_ARG_SRC, image}, {DNNL_ARG_WEIGHTS, filter}, {DNNL_ARG_DST, output}});
      if (problem.bias) args.insert({DNNL_ARG_BIAS, memory(ready.bias, engine, at.bias)});
      break;
    case Op::kInputGrad:
      args.insert({{DNNL_ARG_DIFF_SRC, image}, {DNNL_ARG_WEIGHTS, filter}, {DNNL_ARG_DIFF_DST, output}});
      break;
    case Op::kFilterGrad:
      args.insert({{DNNL_ARG_SRC, image}, {DNNL_ARG_DIFF_WEIGHTS, filter}, {DNNL_ARG_DIFF_DST, output}});
      break;
  }
  const bool filter_out = problem.op == Op::kFilterGrad;
  if (ready.reorder && !filter_out) ready.reorder->execute(stream, outer, filter);
  ready.convolution.execute(stream, args);
  if (ready.reorder && filter_out) ready.reorder->execute(stream, filter, outer);
  stream.wait();
}

template <typename Span>
Dims ToDims(const Span& span) {
  return Dims(span.begin(), span.end());
}

ffi::Error Run(Op op, const ffi::AnyBuffer& image, const ffi::AnyBuffer& filter, const ffi::AnyBuffer& output,
               void* bias, Ints strides, Ints low, Ints high, Ints dilation, int64_t groups) {
  Problem problem;
  problem.op = op;
  problem.bfloat16 = image.element_type() == ffi::DataType::BF16;
  if (!problem.bfloat16 && image.element_type() != ffi::DataType::F32) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "conv3d: only float32 and bfloat16");
  }
  problem.bias = bias != nullptr;
  problem.image = ToDims(image.dimensions());
  problem.filter = ToDims(filter.dimensions());
  problem.output = ToDims(output.dimensions());
  problem.strides = ToDims(strides);
  problem.low = ToDims(low);
  problem.high = ToDims(high);
  problem.dilation = ToDims(dilation);
  problem.groups = groups;
  const Pointers at = {image.untyped_data(), filter.untyped_data(), output.untyped_data(), bias};
  try {
    RunOnTeam([&] {
      if (IsDepthwise(problem)) {
        ExecuteDepthwise(problem, at);
      } else if (IsWinograd(problem)) {
        ExecuteWinograd(problem, at);
      } else {
        Execute(problem, at);
      }
    });
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("conv3d by oneDNN: ") + error.what());
  }
  return ffi::Error::Success();
}

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error Forward(ffi::AnyBuffer image, ffi::AnyBuffer filter, Out output, Ints strides, Ints low, Ints high,
                   Ints dilation, int64_t groups) {
  return Run(Op::kForward, image, filter, *output, nullptr, strides, low, high, dilation, groups);
}

ffi::Error ForwardBias(ffi::AnyBuffer image, ffi::AnyBuffer filter, ffi::AnyBuffer bias, Out output, Ints strides,
                       Ints low, Ints high, Ints dilation, int64_t groups) {
  return Run(Op::kForward, image, filter, *output, bias.untyped_data(), strides, low, high, dilation, groups);
}

ffi::Error InputGrad(ffi::AnyBuffer output, ffi::AnyBuffer filter, Out image, Ints strides, Ints low, Ints high,
                     Ints dilation, int64_t groups) {
  return Run(Op::kInputGrad, *image, filter, output, nullptr, strides, low, high, dilation, groups);
}

ffi::Error FilterGrad(ffi::AnyBuffer image, ffi::AnyBuffer output, Out filter, Ints strides, Ints low, Ints high,
                      Ints dilation, int64_t groups) {
  return Run(Op::kFilterGrad, image, *filter, output, nullptr, strides, low, high, dilation, groups);
}

template <typename Binding>
auto WithAttributes(Binding binding) {
  return std::move(binding)
      .template Attr<Ints>("strides")
      .template Attr<Ints>("low")
      .template Attr<Ints>("high")
      .template Attr<Ints>("dilation")
      .template Attr<int64_t>("groups");
}

auto TwoOperands() {
  return WithAttributes(ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
}

auto ThreeOperands() {
  return WithAttributes(
      ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
}

}  // namespace
}  // namespace medjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_conv3d, medjax::Forward, medjax::TwoOperands());
XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_conv3d_bias, medjax::ForwardBias, medjax::ThreeOperands());
XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_conv3d_input_grad, medjax::InputGrad, medjax::TwoOperands());
XLA_FFI_DEFINE_HANDLER_SYMBOL(medjax_conv3d_filter_grad, medjax::FilterGrad, medjax::TwoOperands());

extern "C" {

// Tells the number of threads; to be called before any handler.
void medjax_set_threads(int threads) { medjax::SetThreads(threads); }

// Name of the instruction set oneDNN generates code for, as its enum (dnnl_cpu_isa_t).
int medjax_instruction_set() {
  return static_cast<int>(dnnl::get_effective_cpu_isa());
}
}
