// fastsafe._native: the only file that knows Python. Keep fastsafe/_native.pyi in step.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "reader.hpp"
#include "safetensors.hpp"

namespace py = pybind11;
using namespace fastsafe;

namespace {

py::tuple header(const File& file) {
  Header header;
  {
    const py::gil_scoped_release release;
    header = read_header(file);
  }
  py::dict tensors;
  for (const TensorInfo& tensor : header.tensors) {
    py::tuple shape(tensor.rank);
    for (std::size_t i = 0; i < tensor.rank; ++i) shape[i] = py::int_(tensor.shape[i]);
    const auto& dtype = tensor.dtype->name;
    tensors[py::str(tensor.name)] =
        py::make_tuple(py::str(dtype.data(), dtype.size()), shape, tensor.begin, tensor.end);
  }
  py::dict metadata;
  for (const auto& [key, value] : header.metadata) metadata[py::str(key)] = py::str(value);
  return py::make_tuple(tensors, metadata, header.data_offset);
}

void read_into(const File& file, std::uintptr_t address, std::uint64_t capacity,
               const std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>>& ranges,
               unsigned threads) {
  const py::gil_scoped_release release;
  std::vector<Range> plan;
  plan.reserve(ranges.size());
  for (const auto& [offset, to, bytes] : ranges) plan.push_back({offset, to, bytes});
  file.read_ranges(reinterpret_cast<char*>(address), capacity, plan, threads);
}

py::bytes read_bytes(const File& file, std::uint64_t offset, std::uint64_t bytes) {
  // a new bytes object nobody else has seen yet: the one moment it may be written to
  py::bytes out(nullptr, bytes);
  char* buffer = PyBytes_AS_STRING(out.ptr());
  const py::gil_scoped_release release;
  file.read_ranges(buffer, bytes, {{offset, 0, bytes}}, 0);
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::register_exception<Error>(m, "Error", PyExc_ValueError);
  py::class_<File>(m, "File")
      .def(py::init([](const py::bytes& path) { return std::make_unique<File>(path); }),
           py::arg("path"))
      .def_property_readonly("size", &File::size)
      .def("header", &header)
      .def("read_into", &read_into, py::arg("address"), py::arg("capacity"), py::arg("ranges"),
           py::arg("threads") = 0)
      .def("read_bytes", &read_bytes, py::arg("offset"), py::arg("bytes"));
}
