// The door to Python: pointers and sizes in, nothing out but what the caller allocated.
//
// kernels.py has checked shapes, dtypes and layout; what is checked here are the sizes that would
// make a kernel read or write out of bounds whatever the caller meant. The GIL is released.
#include "bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "gather.h"
#include "isa.h"

namespace fedspine {
namespace {

void CheckShape(const LinearShape& shape, Address lora_a, Address lora_b, int num_threads) {
  Require(shape.tokens >= 1 && shape.in_features >= 1 && shape.out_features >= 1,
          "expected at least one token, input and output");
  Require(shape.rank >= 0 && (shape.rank == 0 || (lora_a != 0 && lora_b != 0)),
          "expected lora_a and lora_b when the rank is above 0");
  Require(num_threads >= 1, "expected at least one thread");
}

// A rate of r drops a share of r / 2^32 of the values.
Dropout DropoutOf(std::uint32_t rate, std::uint64_t key) {
  return {rate,
          static_cast<float>(1 / (1 - static_cast<double>(rate) / 4294967296.0)),
          {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)}};
}

void Forward(const LinearShape& shape, Address x, const PackedWeight& weight, Address bias,
             Address lora_a, Address lora_b, float scaling, Address y, Address hidden,
             const Dropout& dropout, int num_threads) {
  CheckShape(shape, lora_a, lora_b, num_threads);
  const LoraLinearForwardArgs args = {shape,       In(x),      weight,     In(bias),
                                      In(lora_a),  In(lora_b), scaling,    Out(y),
                                      Out(hidden), dropout,    num_threads};
  const KernelTable& kernels = Kernels();
  float* const scratch = Scratch(kernels.lora_linear_forward_scratch(shape, num_threads));
  kernels.lora_linear_forward(args, scratch);
}

void Backward(const LinearShape& shape, Address dy, Address x, const PackedWeight& weight,
              Address lora_a, Address lora_b, Address hidden, float scaling, Address dx,
              Address dlora_a, Address dlora_b, const Dropout& dropout, int num_threads) {
  CheckShape(shape, lora_a, lora_b, num_threads);
  Require(dlora_a == 0 || (x != 0 && shape.rank > 0), "expected x and a rank for dlora_a");
  Require(dlora_b == 0 || (hidden != 0 && shape.rank > 0),
          "expected hidden and a rank for dlora_b");
  const LoraLinearBackwardArgs args = {shape,        In(dy),     In(x),      weight,  In(lora_a),
                                       In(lora_b),   In(hidden), scaling,    Out(dx), Out(dlora_a),
                                       Out(dlora_b), dropout,    num_threads};
  const KernelTable& kernels = Kernels();
  float* const scratch = Scratch(kernels.lora_linear_backward_scratch(shape, num_threads));
  kernels.lora_linear_backward(args, scratch);
}

void Score(const LinearShape& shape, const PackedWeight& weight, Address lora_a, Address lora_b,
           Address dlora_a, Address dlora_b, float scaling, bool by_output, Index share,
           Index phase, Address out, int num_threads) {
  CheckShape(shape, lora_a, lora_b, num_threads);
  Require(shape.rank > 0 && dlora_a != 0 && dlora_b != 0, "expected a rank and both gradients");
  Require(share >= 1 && phase >= 0, "expected a share of at least 1 and a phase of at least 0");
  const ImportanceArgs args = {shape,       weight,      In(lora_a), In(lora_b),
                               In(dlora_a), In(dlora_b), scaling,    by_output,
                               share,       phase,       Out(out),   num_threads};
  const KernelTable& kernels = Kernels();
  kernels.importance(args, Scratch(kernels.importance_scratch(shape)));
}

KeptMatrix Kept(Address data, Index stride, Address keep_rows, Address keep_columns, Index rows,
                Index columns) {
  return {In(data),
          stride,
          reinterpret_cast<const std::int64_t*>(keep_rows),
          reinterpret_cast<const std::int64_t*>(keep_columns),
          rows,
          columns};
}

PackedWeight Packed(Address panels, Address scales, const std::string& format) {
  Require(panels != 0, "expected panels");
  if (format == "float32") return {In(panels), nullptr, WeightFormat::kFloat32};
  if (format == "bfloat16") return {In(panels), nullptr, WeightFormat::kBfloat16};
  Require(format == "int8", "expected a format of float32, bfloat16, int8");
  Require(scales != 0, "expected scales of an int8 weight");
  return {In(panels), In(scales), WeightFormat::kInt8};
}

// The same memory, to be written.
PackedOut PackedMemory(const PackedWeight& packed) {
  return {const_cast<void*>(packed.panels), const_cast<float*>(packed.scales), packed.format};
}

std::vector<std::string> AvailableIsas() {
  std::vector<std::string> names;
  for (const KernelTable* const* table = AvailableKernels(); *table != nullptr; ++table) {
    names.emplace_back((*table)->name);
  }
  return names;
}

}  // namespace

// Grows and stays: a layer is called again and again, and fresh pages cost more than a small
// product.
float* Scratch(Index floats) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local Index size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(
        ::operator new(static_cast<std::size_t>(floats) * sizeof(float), kAlignment)));
    size = floats;
  }
  return memory.get();
}

}  // namespace fedspine

PYBIND11_MODULE(_native, m) {
  namespace py = pybind11;
  using fedspine::Address;
  using fedspine::Index;
  using fedspine::PackedWeight;
  using fedspine::Require;
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  m.doc() = "Kernels of FedSpine Edge; fedspine_edge.kernels is the door to them.";
  m.attr("PANEL_WIDTH") = fedspine::kPanelWidth;
  py::class_<PackedWeight>(m, "PackedWeight").def(py::init(&fedspine::Packed));
  m.def("available_isas", &fedspine::AvailableIsas);
  m.def("isa", [] { return fedspine::Kernels().name; });
  m.def("use_isa", [](const std::string& name) {
    Require(fedspine::UseKernels(name.c_str()), "this CPU has no such target");
  });
  m.def(
      "lora_linear_forward",
      [](Index tokens, Index in_features, Index out_features, Index rank, Address x,
         const PackedWeight& weight, Address bias, Address lora_a, Address lora_b, float scaling,
         Address y, Address hidden, std::uint32_t dropout_rate, std::uint64_t dropout_key,
         int num_threads) {
        fedspine::Forward({tokens, in_features, out_features, rank}, x, weight, bias, lora_a,
                          lora_b, scaling, y, hidden,
                          fedspine::DropoutOf(dropout_rate, dropout_key), num_threads);
      },
      Unlocked());
  m.def(
      "lora_linear_backward",
      [](Index tokens, Index in_features, Index out_features, Index rank, Address dy, Address x,
         const PackedWeight& weight, Address lora_a, Address lora_b, Address hidden, float scaling,
         Address dx, Address dlora_a, Address dlora_b, std::uint32_t dropout_rate,
         std::uint64_t dropout_key, int num_threads) {
        fedspine::Backward({tokens, in_features, out_features, rank}, dy, x, weight, lora_a, lora_b,
                           hidden, scaling, dx, dlora_a, dlora_b,
                           fedspine::DropoutOf(dropout_rate, dropout_key), num_threads);
      },
      Unlocked());
  m.def(
      "importance",
      [](Index in_features, Index out_features, Index rank, const PackedWeight& weight,
         Address lora_a, Address lora_b, Address dlora_a, Address dlora_b, float scaling,
         bool by_output, Index share, Index phase, Address out, int num_threads) {
        fedspine::Score({1, in_features, out_features, rank}, weight, lora_a, lora_b, dlora_a,
                        dlora_b, scaling, by_output, share, phase, out, num_threads);
      },
      Unlocked());
  fedspine::BindStep(m);
  m.def(
      "gather",
      [](Address data, Index stride, Address keep_rows, Address keep_columns, Index rows,
         Index columns, Address out, int num_threads) {
        Require(rows >= 0 && columns >= 0, "expected sizes of at least 0");
        fedspine::Gather(fedspine::Kept(data, stride, keep_rows, keep_columns, rows, columns),
                         fedspine::Out(out), num_threads);
      },
      Unlocked());
  m.def(
      "pack_weight",
      [](Address data, Index stride, Address keep_rows, Address keep_columns, Index rows,
         Index columns, const PackedWeight& packed, int num_threads) {
        Require(rows >= 1 && columns >= 1, "expected at least one row and one column");
        fedspine::PackWeight(fedspine::Kept(data, stride, keep_rows, keep_columns, rows, columns),
                             fedspine::PackedMemory(packed), num_threads);
      },
      Unlocked());
  m.def(
      "unpack_weight",
      [](const PackedWeight& packed, Index out_features, Index in_features, Address weight,
         int num_threads) {
        Require(out_features >= 1 && in_features >= 1,
                "expected at least one output and one input");
        fedspine::UnpackWeight(packed, out_features, in_features, fedspine::Out(weight),
                               num_threads);
      },
      Unlocked());
}
