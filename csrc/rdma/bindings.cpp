// What Python sees of the rdma engine's kernels: plain addresses, sizes and streams.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "endpoint.hpp"

namespace py = pybind11;
using namespace deepep_train::rdma;

#define DT_FIELD(name) .def_readwrite(#name, &P::name)

PYBIND11_MODULE(_rdma, m) {
    m.doc() = "deepep_train's kernels between nodes, over NVSHMEM";
    py::module_::import("deepep_train._C");  // has the low-latency calls' arguments
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    {
        using P = RailParams;
        py::class_<P>(m, "RailParams")
            .def(py::init<>()) DT_FIELD(rows) DT_FIELD(token) DT_FIELD(send_at) DT_FIELD(recv_at) DT_FIELD(addresses)
                DT_FIELD(beside) DT_FIELD(beside_addresses) DT_FIELD(beside_bytes) DT_FIELD(row_bytes) DT_FIELD(rows_per_put)
                    DT_FIELD(num_sms);
    }
    {
        using P = SumParams;
        py::class_<P>(m, "SumParams")
            .def(py::init<>()) DT_FIELD(out) DT_FIELD(bias_0) DT_FIELD(bias_1) DT_FIELD(place) DT_FIELD(recv_at)
                DT_FIELD(row_bytes) DT_FIELD(num_tokens) DT_FIELD(dtype) DT_FIELD(num_sms);
    }
    py::class_<Failure>(m, "Failure")
        .def_readonly("number", &Failure::number)
        .def_readonly("meeting", &Failure::meeting)
        .def_readonly("ranks", &Failure::ranks);
    py::class_<Endpoint>(m, "Endpoint")
        .def(py::init<int, int, int, int, int64_t, int, double>(), py::arg("device"), py::arg("rank"), py::arg("num_ranks"),
             py::arg("num_local_ranks"), py::arg("segment_bytes"), py::arg("num_qps"), py::arg("timeout_seconds"), no_gil)
        .def_property_readonly("send", &Endpoint::send)
        .def_property_readonly("recv", &Endpoint::recv)
        .def_property_readonly("segment_bytes", &Endpoint::segment_bytes)
        .def("rail", &Endpoint::rail)
        .def("sum", &Endpoint::sum)
        .def("put_dispatch", &Endpoint::put_dispatch)
        .def("put_combine", &Endpoint::put_combine)
        .def("answer", &Endpoint::answer)
        .def("failure", &Endpoint::failure);
    const auto address = [](const void* memory) { return reinterpret_cast<uint64_t>(memory); };
    m.def("allocate", [=](size_t bytes) { return address(allocate(bytes)); }, no_gil);
    m.def("of_peer", [=](uint64_t symmetric, int rank) { return address(of_peer(reinterpret_cast<void*>(symmetric), rank)); });
    m.def("unique_id", [] { return py::bytes(unique_id()); });
    m.def("start", &start, no_gil);
    m.attr("max_nodes") = kMaxNodes;
}
