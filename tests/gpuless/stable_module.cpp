// call(leaf, kinds, values, outputs, settings) -> arrays, for leaf ops compiled into this Python module: numpy in, numpy out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "stable_runtime.h"

namespace py = pybind11;

namespace {

const std::pair<const char*, int32_t> kDtypes[] = {{"uint8", 0}, {"int8", 1}, {"int16", 2}, {"int32", 3}, {"int64", 4},
    {"float16", 5}, {"float32", 6}, {"float64", 7}, {"bool", 11}, {"bfloat16", 15}};

AtenTensorOpaque tensor(const py::array& a) {
  const std::string name = py::str(a.dtype());
  for (const auto& [known, code] : kDtypes) {
    if (name != known) continue;
    AtenTensorOpaque t{const_cast<void*>(a.data()), code, {}, {}, nullptr};
    for (int i = 0; i < a.ndim(); i++) {
      t.sizes.push_back(a.shape(i));
      t.strides.push_back(a.strides(i) / a.itemsize());
    }
    return t;
  }
  throw py::type_error("an array of dtype " + name);
}

StableIValue argument(const std::string& kind, const py::handle& value) {
  if (kind == "Tensor") return host::pass(tensor(value.cast<py::array>()));
  if (kind == "bool") return host::pass(value.cast<bool>());
  if (kind == "int") return host::pass(value.cast<int64_t>());
  if (kind == "float") return host::pass(value.cast<double>());
  if (kind == "List[bool]") return host::pass(value.cast<std::vector<bool>>());
  if (kind.rfind("Optional[", 0) != 0) throw py::type_error("an argument of type " + kind);
  if (value.is_none()) return host::pass_optional(nullptr);
  const StableIValue inner = argument(kind.substr(9, kind.size() - 10), value);
  return host::pass_optional(&inner);
}

// Bytes of the outputs with dtype, sizes and strides: numpy alone has no bfloat16.
py::list call(const std::string& leaf, const std::vector<std::string>& kinds, const py::list& values, size_t outputs,
    const std::map<std::string, int64_t>& settings) {
  host::Settings s;
  for (const auto& [name, value] : settings) s.set(name, value);
  host::settings() = s;
  std::vector<StableIValue> stack;
  for (size_t i = 0; i < kinds.size(); i++) stack.push_back(argument(kinds[i], values[i]));
  py::list out;
  for (const AtenTensorOpaque& t : host::call(leaf, std::move(stack), outputs)) {
    const char* dtype = "";
    for (const auto& [known, code] : kDtypes)
      if (code == t.dtype) dtype = known;
    out.append(py::make_tuple(dtype, t.sizes, t.strides, py::bytes(static_cast<const char*>(t.data), host::span(t))));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(module, m) { m.def("call", &call); }
