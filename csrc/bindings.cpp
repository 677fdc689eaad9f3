// The Python module fastsafe._native. Its stub is fastsafe/_native.pyi.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "batch.hpp"
#include "decoder.hpp"
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
  // bytes may be written to only until other code can see the object
  py::bytes out(nullptr, bytes);
  char* buffer = PyBytes_AS_STRING(out.ptr());
  const py::gil_scoped_release release;
  file.read_ranges(buffer, bytes, {{offset, 0, bytes}}, 0);
  return out;
}

using Address = std::uintptr_t;  // of fp32 or int64 elements; 0: none

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using MatrixArgs = std::tuple<Address, cpu::Index, cpu::Index, cpu::Index, cpu::Index>;

cpu::Matrix matrix(const MatrixArgs& m) {
  const auto& [data, rows, columns, row_stride, column_stride] = m;
  return {at(data), rows, columns, row_stride, column_stride};
}

void linear(Address y, cpu::Index y_row, bool accumulate,
            const std::vector<std::pair<MatrixArgs, MatrixArgs>>& terms, Address bias,
            unsigned threads) {
  const py::gil_scoped_release release;
  std::vector<cpu::Term> plan;
  plan.reserve(terms.size());
  for (const auto& [x, w] : terms) plan.push_back({matrix(x), matrix(w)});
  cpu::Team team(threads);
  cpu::linear(at(y), y_row, accumulate, plan.data(), static_cast<int>(plan.size()), at(bias), team);
}

// Addresses and sizes are checked by fastsafe/model/cpu_ops.py, not here.
void bind_cpu(py::module_& m) {
  using cpu::Index;
  const py::call_guard<py::gil_scoped_release> free;
  m.def("instruction_set", &cpu::instruction_set);
  m.def("use_instruction_set", &cpu::use_instruction_set);
  m.def("linear", &linear);
  m.def("norm", [](Address y, Address h, Address r, Address x, Address residual, Address w,
                   Index rows, Index columns, float alpha, float eps, bool one_plus) {
    cpu::norm(at(y), at(h), at(r), at(x), at(residual), at(w), rows, columns, alpha, eps, one_plus);
  }, free);
  m.def("norm_backward", [](Address dx, Address dy, Address dh, Address h, Address r, Address w,
                            Index rows, Index columns, bool one_plus) {
    cpu::norm_backward(at(dx), at(dy), at(dh), at(h), at(r), at(w), rows, columns, one_plus);
  }, free);
  m.def("gated", [](Address y, Address gate_up, Index rows, Index columns, bool gelu) {
    cpu::gated(at(y), at(gate_up), rows, columns, gelu);
  }, free);
  m.def("gated_backward", [](Address d_gate_up, Address dy, Address gate_up, Index rows,
                             Index columns, bool gelu) {
    cpu::gated_backward(at(d_gate_up), at(dy), at(gate_up), rows, columns, gelu);
  }, free);
  m.def("rope", [](Address y, Index y_row, Address x, Index x_row, Address cos, Address sin,
                   Index table_row, Index rows, Index heads, Index dim, Index rotated, bool back) {
    cpu::rope(at(y), y_row, at(x), x_row, at(cos), at(sin), table_row, rows, heads, dim, rotated,
              back);
  }, free);
  py::class_<cpu::Attention>(m, "Attention")
      .def(py::init([](Address starts, Index sequences, Index heads, Index kv_heads, Index dim,
                       Index q_row, Index kv_row, float scale, float cap, Index window) {
        return cpu::Attention{at<std::int64_t>(starts), sequences, heads, kv_heads, dim, q_row,
                              kv_row, scale, cap, window};
      }))
      .def("forward", [](const cpu::Attention& a, Address out, Address scales, Address q, Address k,
                         Address v) { cpu::attention(at(out), at<cpu::Scale>(scales), at(q), at(k), at(v), a); },
           free)
      .def("backward", [](const cpu::Attention& a, Address dq, Address dk, Address dv,
                          Address d_out, Address scales, Address q, Address k,
                          Address v) {
        cpu::attention_backward(at(dq), at(dk), at(dv), at(d_out), at<cpu::Scale>(scales), at(q), at(k),
                                at(v), a);
      }, free);
  m.def("paged_attention", [](Address out, Address keys, Address values, Address q, Address k,
                              Address v, Address starts, Address positions, Address cache_slots,
                              Address table, Index rows, Index width, Index heads, Index kv_heads,
                              Index dim, Index q_row, Index kv_row, Index key_page,
                              Index value_page, float scale, float cap, Index window) {
    cpu::Team alone(1);
    cpu::paged_attention(at(out), at(keys), at(values), at(q), at(k), at(v),
                         {at<std::int64_t>(starts), at<std::int64_t>(positions),
                          at<std::int64_t>(cache_slots), at<std::int32_t>(table), rows, width, heads,
                          kv_heads, dim, q_row, kv_row, key_page, value_page, scale, cap, window}, alone);
  }, free);
}

using LinearArgs = std::tuple<Address, Address, cpu::Index, cpu::Index>;
using PartArgs = std::tuple<cpu::Index, cpu::Index, cpu::Index, cpu::Index, Address>;

struct Patches {  // changes of an adapter to the linears of all layers
  std::vector<cpu::Patch> by_linear;
};

cpu::Layer layer_of(const std::vector<LinearArgs>& linears, const std::vector<Address>& norms,
                    cpu::Index window, cpu::Index rotation) {
  cpu::Layer layer{};
  for (int i = 0; i < cpu::kNames; ++i) {
    const auto& [weight, bias, out, in] = linears.at(i);
    layer.linears[i] = {at(weight), at(bias), out, in};
  }
  const float** to[] = {&layer.attention_norm, &layer.attention_out_norm, &layer.mlp_norm,
                        &layer.mlp_out_norm,   &layer.q_norm,             &layer.k_norm};
  for (int i = 0; i < 6; ++i) *to[i] = at(norms.at(i));
  layer.window = window;
  layer.rotation = rotation;
  return layer;
}

void bind_decoder(py::module_& m) {
  using cpu::Index;
  py::class_<Patches>(m, "Patches")
      .def(py::init([](Index count) { return Patches{std::vector<cpu::Patch>(count)}; }))
      .def("replace", [](Patches& p, Index i, Address weight) { p.by_linear.at(i).weight = at(weight); })
      .def("add", [](Patches& p, Index i, Address a, Index rank, const std::vector<PartArgs>& parts) {
        cpu::Patch& patch = p.by_linear.at(i);
        patch.a = at(a);
        patch.rank = rank;
        for (const auto& [begin, end, first, last, b] : parts)
          patch.parts.push_back({begin, end, first, last, at(b)});
      });
  py::class_<cpu::Layer>(m, "Layer").def(py::init(&layer_of));
  py::class_<cpu::Decoder>(m, "Decoder")
      .def(py::init([](Index vocab, Index hidden, Index heads, Index kv_heads, Index dim, float eps,
                       float scale, float cap, float embedding_scale, float residual_scale,
                       bool one_plus, bool gelu, bool norms_projection,
                       const std::vector<cpu::Layer>& layers, Address embedding, Address final_norm) {
        const cpu::Sizes sizes = {vocab, hidden, heads, kv_heads, dim, eps, scale, cap,
                                  embedding_scale, residual_scale, one_plus, gelu, norms_projection};
        return std::make_unique<cpu::Decoder>(sizes, layers, at(embedding), at(final_norm));
      }))
      .def_static("workspace_bytes", &cpu::Decoder::workspace_bytes)
      .def("forward",
           [](cpu::Decoder& decoder, Address out, Address token_ids, Index tokens, Address keep,
              Index kept, const std::vector<std::tuple<const Patches*, Index, Index>>& segments,
              const std::vector<std::tuple<Address, Address, Index, Index>>& rotations,
              Address starts, Address positions, Address cache_slots, Address table, Index rows,
              Index width, Address keys, Address values, Index key_page, Index value_page,
              Index key_layer, Index value_layer, unsigned threads) {
             cpu::Step step{at<std::int64_t>(token_ids), tokens, at<std::int64_t>(keep), kept, {}, {},
                            {}, at(keys), at(values), key_layer, value_layer};
             for (const auto& [patches, end, kept_end] : segments)
               step.segments.push_back({patches ? &patches->by_linear : nullptr, end, kept_end});
             for (const auto& [cos, sin, row, columns] : rotations)
               step.rotations.push_back({at(cos), at(sin), row, columns});
             step.paged.starts = at<std::int64_t>(starts);
             step.paged.positions = at<std::int64_t>(positions);
             step.paged.cache_slots = at<std::int64_t>(cache_slots);
             step.paged.table = at<std::int32_t>(table);
             step.paged.rows = rows;
             step.paged.width = width;
             step.paged.key_page = key_page;
             step.paged.value_page = value_page;
             const py::gil_scoped_release release;
             cpu::Team team(threads);
             decoder.forward(at(out), step, team);
           });
}

template <class T>
py::array_t<T> array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
const T* data(const Array<T>& values, Int count, const char* name) {
  if (values.size() != count)
    throw Error("batch: " + std::string(name) + " has " + std::to_string(values.size()) +
                " values, expected " + std::to_string(count));
  return values.data();
}

void bind_plan(py::module_& m) {
  py::class_<StepPlan> plan(m, "StepPlan");
  const auto field = [&](const char* name, std::vector<Int> StepPlan::*member) {
    plan.def_property_readonly(name, [member](const StepPlan& p) { return array(p.*member); });
  };
  field("token_ids", &StepPlan::token_ids);
  field("positions", &StepPlan::positions);
  field("cache_slots", &StepPlan::cache_slots);
  field("context_lens", &StepPlan::context_lens);
  field("handles", &StepPlan::handles);
  field("starts", &StepPlan::starts);
  field("keep", &StepPlan::keep);
  field("kept_handles", &StepPlan::kept_handles);
  field("kept_stamps", &StepPlan::kept_stamps);
  field("targets", &StepPlan::targets);
  field("preempted", &StepPlan::preempted);
  plan.def_property_readonly("segments",
                             [](const StepPlan& p) { return array(p.segments).reshape({-1, 3}); });
  plan.def_property_readonly("copies",
                             [](const StepPlan& p) { return array(p.copies).reshape({-1, 2}); });
  plan.def_property_readonly("table", [](const StepPlan& p) {
    return array(p.table).reshape({static_cast<Int>(p.handles.size()), p.width});
  });
}

void bind_batch(py::module_& m) {
  bind_plan(m);
  using Ints = Array<Int>;
  using Flags = Array<bool>;
  py::class_<Batch>(m, "Batch")
      .def(py::init<Int, Int, Int, bool, bool, Int>())
      .def("add", [](Batch& b, Int adapter_slot, std::uint64_t cache_namespace,
                     const Array<Token>& tokens, Int max_tokens_total, Int prefill_until,
                     Int logits_from) {
        return b.add(adapter_slot, cache_namespace, tokens.data(), tokens.size(), max_tokens_total,
                     prefill_until, logits_from);
      })
      .def("admit", &Batch::admit)
      .def("plan", &Batch::plan)
      .def("append", [](Batch& b, const Ints& handles, const Ints& stamps, const Ints& ids,
                        const std::optional<Array<float>>& logprobs, const Flags& finite,
                        const Flags& stops) {
        const Int n = handles.size();
        return b.append(n, handles.data(), data(stamps, n, "stamps"), data(ids, n, "ids"),
                        logprobs ? data(*logprobs, n, "logprobs") : nullptr,
                        data(finite, n, "finite"), data(stops, n, "stops"));
      })
      .def("record", [](Batch& b, const Ints& handles, const Ints& stamps,
                        const Array<float>& logprobs, const Flags& greedy) {
        const Int n = handles.size();
        return b.record(n, handles.data(), data(stamps, n, "stamps"),
                        data(logprobs, n, "logprobs"), data(greedy, n, "greedy"));
      })
      .def("remove", &Batch::remove)
      .def("preempt_all", &Batch::preempt_all)
      .def("evict_all", &Batch::evict_all)
      .def("tokens", &Batch::tokens)
      .def("logprobs", &Batch::logprobs)
      .def("is_greedy", &Batch::is_greedy)
      .def("check", &Batch::check)
      .def_property_readonly("running", &Batch::running)
      .def_property_readonly("available", &Batch::available);
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
  bind_cpu(m);
  bind_decoder(m);
  bind_batch(m);
}
