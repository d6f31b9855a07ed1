// The Python module object: importing it registers the ops (ops.cpp and the backends' files do so when they are
// loaded) and tells how it was built. Everything else goes through torch.ops.dora_ext, but for what every forward of a
// layer does: that takes the host longer than a launch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "python_call.h"

#define DORA_EXT_STRING_(...) #__VA_ARGS__
#define DORA_EXT_STRING(...) DORA_EXT_STRING_(__VA_ARGS__)

namespace dora_ext {
namespace {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What tells tensors and their present values from others as far as the host can: their storages, eight bytes each,
// and then for each its place there, dtype and version. Not the storage's address, for FSDP2 frees its memory and
// allocates it again, and what it then holds is the same. None: one of them has no version, or no certain shape.
// Asked for one by one in Python, these take as long as a launch.
py::object places(const py::tuple& tensors) {
  std::vector<int64_t> storages, others;
  for (const py::handle item : tensors) {
    if (!THPVariable_Check(item.ptr())) throw py::type_error("places: tensors: expected Tensors");
    const at::Tensor& t = THPVariable_Unpack(item.ptr());
    if (t.is_inference() || t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return py::none();
    storages.push_back(reinterpret_cast<intptr_t>(t.storage().unsafeGetStorageImpl()));
    others.insert(others.end(), {t.storage_offset(), t._version(), static_cast<int64_t>(t.scalar_type()), t.dim()});
    others.insert(others.end(), t.sizes().begin(), t.sizes().end());
    others.insert(others.end(), t.strides().begin(), t.strides().end());
  }
  storages.insert(storages.end(), others.begin(), others.end());
  return py::bytes(reinterpret_cast<const char*>(storages.data()), storages.size() * sizeof(int64_t));
}

// The least and the largest of ids, of which there are some: one launch and one transfer.
py::tuple id_range(const py::handle ids) {
  if (!THPVariable_Check(ids.ptr())) throw py::type_error("id_range: ids: expected a Tensor");
  const Tensor& t = THPVariable_Unpack(ids.ptr());
  Tensor range;
  {
    const py::gil_scoped_release without_gil;
    const InsideOp inside;
    range = at::empty({2}, t.options());
    Tensor low = range.select(0, 0), high = range.select(0, 1);
    at::aminmax_out(low, high, t);
    range = range.to(at::kCPU, at::kLong);
  }
  const int64_t* found = range.const_data_ptr<int64_t>();
  return py::make_tuple(found[0], found[1]);
}

constexpr char kLinear[] = "dora_ext::linear", kLinearNf4[] = "dora_ext::linear_nf4", kConv[] = "dora_ext::conv",
               kEmbedding[] = "dora_ext::embedding", kNorm[] = "dora_ext::norm",
               kNormCached[] = "dora_ext::norm_cached";

// Signatures: ops.cpp.
constexpr auto linear = python_call<kLinear, Tensor, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                    double, bool, const OptionalTensor&, const OptionalTensor&, int64_t, bool>;
constexpr auto linear_nf4 =
    python_call<kLinearNf4, Tensor, const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef,
                at::ScalarType, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, const OptionalTensor&,
                const OptionalTensor&, const OptionalTensor&, int64_t, bool>;
constexpr auto conv = python_call<kConv, Tensor, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double,
                                  at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, bool>;
constexpr auto embedding =
    python_call<kEmbedding, Tensor, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const Tensor&, double, double, int64_t, bool, bool>;
constexpr auto norm = python_call<kNorm, std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&, const Tensor&,
                                  const Tensor&, double, bool>;
constexpr auto norm_cached = python_call<kNormCached, std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, double, bool, Tensor&, Tensor&, int64_t>;

template <typename Function>
PyMethodDef method(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method("linear", linear),      method("linear_nf4", linear_nf4),
                         method("conv", conv),          method("embedding", embedding),
                         method("norm", norm),          method("norm_cached", norm_cached),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace dora_ext

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of dora_ext";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("architectures") = DORA_EXT_STRING(DORA_EXT_ARCHITECTURES);  // "" in a CPU-only build, else "7.5,8.0,..."
  m.attr("compiler") = std::string("C++ ") + __VERSION__;
  m.attr("cxx_standard") = static_cast<long>(__cplusplus);
  m.def("places", &dora_ext::places);
  m.def("id_range", &dora_ext::id_range);
  if (PyModule_AddFunctions(m.ptr(), dora_ext::methods) != 0) throw pybind11::error_already_set();
}
