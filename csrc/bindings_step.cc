// The door to Python of what stands between the linears; attention.py, elementwise.py and
// cross_entropy.py have checked shapes, dtypes and layout.
#include "bindings.h"
#include "isa.h"

namespace fedspine {
namespace {

namespace py = pybind11;
using Unlocked = py::call_guard<py::gil_scoped_release>;

const Bfloat16* InKept(Address address) { return reinterpret_cast<const Bfloat16*>(address); }
Bfloat16* OutKept(Address address) { return reinterpret_cast<Bfloat16*>(address); }

void CheckRows(Index tokens, Index features, int num_threads) {
  Require(tokens >= 1 && features >= 1, "expected at least one token and one feature");
  Require(num_threads >= 1, "expected at least one thread");
}

void CheckElements(Index size, int num_threads) {
  Require(size >= 1, "expected at least one element");
  Require(num_threads >= 1, "expected at least one thread");
}

void BindNorms(py::module_& m) {
  m.def(
      "rms_norm_forward",
      [](Index tokens, Index features, Address x, Address weight, float epsilon, Address y,
         Address rstd, int num_threads) {
        CheckRows(tokens, features, num_threads);
        Kernels().rms_norm_forward(
            {tokens, features, In(x), In(weight), epsilon, Out(y), Out(rstd), num_threads});
      },
      Unlocked());
  m.def(
      "rms_norm_backward",
      [](Index tokens, Index features, Address dy, Address x, Address weight, Address rstd,
         Address dx, int num_threads) {
        CheckRows(tokens, features, num_threads);
        Kernels().rms_norm_backward(
            {tokens, features, In(dy), In(x), In(weight), In(rstd), Out(dx), num_threads});
      },
      Unlocked());
  m.def(
      "layer_norm_forward",
      [](Index tokens, Index features, Address x, Address residual, Address weight, Address bias,
         float epsilon, Address y, Address kept, Address rstd, int num_threads) {
        CheckRows(tokens, features, num_threads);
        Kernels().layer_norm_forward({tokens, features, In(x), In(residual), In(weight), In(bias),
                                      epsilon, Out(y), OutKept(kept), Out(rstd), num_threads});
      },
      Unlocked());
  m.def(
      "layer_norm_again",
      [](Index tokens, Index features, Address normalised, Address weight, Address bias, Address y,
         int num_threads) {
        CheckRows(tokens, features, num_threads);
        Kernels().layer_norm_again(
            {tokens, features, InKept(normalised), In(weight), In(bias), Out(y), num_threads});
      },
      Unlocked());
  m.def(
      "layer_norm_backward",
      [](Index tokens, Index features, Address dy, Address normalised, Address weight, Address rstd,
         Address dz, int num_threads) {
        CheckRows(tokens, features, num_threads);
        Kernels().layer_norm_backward({tokens, features, In(dy), InKept(normalised), In(weight),
                                       In(rstd), Out(dz), num_threads});
      },
      Unlocked());
}

void BindActivations(py::module_& m) {
  m.def(
      "swiglu_forward",
      [](Index size, Address gate, Address up, Address y, Address kept_gate, Address kept_up,
         int num_threads) {
        CheckElements(size, num_threads);
        Require((kept_gate == 0) == (kept_up == 0),
                "expected both kept_gate and kept_up or neither");
        Kernels().swiglu_forward(
            {size, In(gate), In(up), Out(y), OutKept(kept_gate), OutKept(kept_up), num_threads});
      },
      Unlocked());
  m.def(
      "swiglu_again",
      [](Index size, Address gate, Address up, Address y, int num_threads) {
        CheckElements(size, num_threads);
        Kernels().swiglu_again({size, InKept(gate), InKept(up), Out(y), num_threads});
      },
      Unlocked());
  m.def(
      "swiglu_backward",
      [](Index size, Address dy, Address gate, Address up, Address dgate, Address dup,
         int num_threads) {
        CheckElements(size, num_threads);
        Kernels().swiglu_backward(
            {size, In(dy), InKept(gate), InKept(up), Out(dgate), Out(dup), num_threads});
      },
      Unlocked());
  m.def(
      "gelu_forward",
      [](Index size, Address x, Address y, Address kept, int num_threads) {
        CheckElements(size, num_threads);
        Kernels().gelu_forward({size, In(x), Out(y), OutKept(kept), num_threads});
      },
      Unlocked());
  m.def(
      "gelu_again",
      [](Index size, Address x, Address y, int num_threads) {
        CheckElements(size, num_threads);
        Kernels().gelu_again({size, InKept(x), Out(y), num_threads});
      },
      Unlocked());
  m.def(
      "gelu_backward",
      [](Index size, Address dy, Address x, Address dx, int num_threads) {
        CheckElements(size, num_threads);
        Kernels().gelu_backward({size, In(dy), InKept(x), Out(dx), num_threads});
      },
      Unlocked());
}

// The tensors and settings of attention, as Python hands them over.
struct AttentionCall {
  Address q, k, v, cos, sin;
  Index rotation_stride;
  Address bias, valid;
  float scale;
  bool causal;
  int num_threads;
};

AttentionInputs Checked(const AttentionShape& shape, const AttentionCall& call) {
  const auto [batch, tokens, heads, kv_heads, head_dim] = shape;
  Require(batch >= 1 && tokens >= 1 && kv_heads >= 1 && head_dim >= 1,
          "expected at least one row, token, head and feature");
  Require(heads >= 1 && heads % kv_heads == 0, "expected query heads in equal groups");
  Require((call.cos == 0) == (call.sin == 0), "expected both cos and sin or neither");
  Require(call.cos == 0 || head_dim % 2 == 0, "expected an even head size to rotate");
  Require(call.num_threads >= 1, "expected at least one thread");
  return {shape,
          In(call.q),
          In(call.k),
          In(call.v),
          In(call.cos),
          In(call.sin),
          call.rotation_stride,
          In(call.bias),
          reinterpret_cast<const unsigned char*>(call.valid),
          call.scale,
          call.causal,
          call.num_threads};
}

void BindAttention(py::module_& m) {
  py::class_<AttentionShape>(m, "AttentionShape")
      .def(py::init([](Index batch, Index tokens, Index heads, Index kv_heads, Index head_dim) {
        return AttentionShape{batch, tokens, heads, kv_heads, head_dim};
      }));
  py::class_<AttentionCall>(m, "AttentionCall")
      .def(py::init([](Address q, Address k, Address v, Address cos, Address sin,
                       Index rotation_stride, Address bias, Address valid, float scale, bool causal,
                       int num_threads) {
        return AttentionCall{q,    k,     v,     cos,    sin,        rotation_stride,
                             bias, valid, scale, causal, num_threads};
      }));
  m.def(
      "attention_forward",
      [](const AttentionShape& shape, const AttentionCall& call, Address out, Address lse) {
        const AttentionForwardArgs args = {Checked(shape, call), Out(out), Out(lse)};
        const KernelTable& kernels = Kernels();
        kernels.attention_forward(
            args, Scratch(kernels.attention_forward_scratch(shape, call.num_threads)));
      },
      Unlocked());
  m.def(
      "attention_backward",
      [](const AttentionShape& shape, const AttentionCall& call, Address out, Address lse,
         Address dout, Address dq, Address dk, Address dv) {
        const AttentionBackwardArgs args = {
            Checked(shape, call), In(out), In(lse), In(dout), Out(dq), Out(dk), Out(dv)};
        const KernelTable& kernels = Kernels();
        kernels.attention_backward(
            args, Scratch(kernels.attention_backward_scratch(shape, call.num_threads)));
      },
      Unlocked());
}

void BindLoss(py::module_& m) {
  m.def(
      "cross_entropy",
      [](Index tokens, Index classes, Address logits, Address targets, float scale, Address loss,
         int num_threads) {
        CheckRows(tokens, classes, num_threads);
        Kernels().cross_entropy({tokens, classes, Out(logits),
                                 reinterpret_cast<const std::int64_t*>(targets), scale, Out(loss),
                                 num_threads});
      },
      Unlocked());
}

}  // namespace

void BindStep(py::module_& m) {
  BindNorms(m);
  BindActivations(m);
  BindAttention(m);
  BindLoss(m);
}

}  // namespace fedspine
