// An op called from Python past torch.ops, which packs the arguments into IValues and unpacks them again: of a layer's
// 14 arguments that takes 6 to 10 us of the host, this 3. The dispatcher is the same, and so are errors.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "inside_op.h"

namespace dora_ext {

// What is not taken here: subclasses and symbols, which torch.ops knows how to treat.
struct NotPlain {};

inline void require_plain(bool condition) {
  if (!condition) throw NotPlain{};
}

// An argument on its way, and what the op gets.
template <typename T>
struct FromPython;

template <>
struct FromPython<const at::Tensor&> {
  const at::Tensor& value;
  explicit FromPython(PyObject* o) : value((require_plain(THPVariable_CheckExact(o)), THPVariable_Unpack(o))) {}
};
template <>
struct FromPython<at::Tensor&> {
  at::Tensor value;
  explicit FromPython(PyObject* o) : value(FromPython<const at::Tensor&>(o).value) {}
};
template <>
struct FromPython<const std::optional<at::Tensor>&> {
  std::optional<at::Tensor> value;
  explicit FromPython(PyObject* o) {
    if (o != Py_None) value = FromPython<const at::Tensor&>(o).value;
  }
};
template <>
struct FromPython<double> {
  double value;
  explicit FromPython(PyObject* o) : value((require_plain(PyFloat_CheckExact(o)), PyFloat_AS_DOUBLE(o))) {}
};
template <>
struct FromPython<bool> {
  bool value;
  explicit FromPython(PyObject* o) : value((require_plain(PyBool_Check(o)), o == Py_True)) {}
};
template <>
struct FromPython<int64_t> {
  int64_t value;
  explicit FromPython(PyObject* o) : value((require_plain(PyLong_CheckExact(o)), PyLong_AsLongLong(o))) {
    if (value == -1 && PyErr_Occurred() != nullptr) throw python_error();
  }
};
template <>
struct FromPython<at::ScalarType> {
  at::ScalarType value;
  explicit FromPython(PyObject* o)
      : value((require_plain(THPDtype_Check(o)), reinterpret_cast<THPDtype*>(o)->scalar_type)) {}
};
template <typename Number>
struct FromPython<c10::ArrayRef<Number>> {
  std::vector<Number> value;
  explicit FromPython(PyObject* o) {
    require_plain(PyTuple_Check(o));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(o); ++i) {
      value.emplace_back(FromPython<int64_t>(PyTuple_GET_ITEM(o, i)).value);
    }
  }
};

inline PyObject* to_python(at::Tensor t) {
  return THPVariable_Wrap(std::move(t));
}
inline PyObject* to_python(const std::tuple<at::Tensor, at::Tensor>& pair) {
  const auto object = [](const at::Tensor& t) { return pybind11::reinterpret_steal<pybind11::object>(to_python(t)); };
  return pybind11::make_tuple(object(std::get<0>(pair)), object(std::get<1>(pair))).release().ptr();
}

template <typename Result, typename Op, typename... Args, size_t... I>
PyObject* call_op(const Op& op, PyObject* const* given, std::tuple<Args...>*, std::index_sequence<I...>) {
  std::tuple<FromPython<Args>...> args{given[I]...};
  Result result;
  {
    const pybind11::gil_scoped_release without_gil;
    result = op.call(std::get<I>(args).value...);
  }
  return to_python(std::move(result));
}

// The METH_FASTCALL function of the op called `kName`; NotImplemented: call torch.ops.
template <const char* kName, typename Result, typename... Args>
PyObject* python_call(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != sizeof...(Args) || at::impl::torch_function_mode_enabled()) Py_RETURN_NOTIMPLEMENTED;
  static auto op = find_op<Result(Args...)>(kName);
  try {
    return call_op<Result>(op, args, static_cast<std::tuple<Args...>*>(nullptr), std::index_sequence_for<Args...>());
  } catch (const NotPlain&) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  END_HANDLE_TH_ERRORS
}

}  // namespace dora_ext
