// What Python sees of the rdma engine's kernels: plain addresses, sizes and streams.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "endpoint.hpp"

namespace py = pybind11;
using namespace deepep_train::rdma;

#define DT_FIELD(name) .def_readwrite(#name, &P::name)

namespace {

void bind_fresh(py::module_& m) {
    {
        using P = TellParams;
        py::class_<P>(m, "TellParams")
            .def(py::init<>()) DT_FIELD(is_token_in_rank) DT_FIELD(num_tokens_per_rank) DT_FIELD(num_tokens_per_expert)
                DT_FIELD(wrong) DT_FIELD(place) DT_FIELD(row) DT_FIELD(signature) DT_FIELD(bound) DT_FIELD(status)
                    DT_FIELD(num_tokens) DT_FIELD(num_ranks) DT_FIELD(num_nodes) DT_FIELD(num_experts) DT_FIELD(row_words);
    }
    {
        using P = DigestParams;
        py::class_<P>(m, "DigestParams")
            .def(py::init<>()) DT_FIELD(table) DT_FIELD(rows) DT_FIELD(tokens_per_expert) DT_FIELD(found) DT_FIELD(send_at)
                DT_FIELD(recv_at) DT_FIELD(received_upto) DT_FIELD(theirs) DT_FIELD(begin) DT_FIELD(expert_base)
                    DT_FIELD(result_words) DT_FIELD(report) DT_FIELD(room) DT_FIELD(widest) DT_FIELD(rank) DT_FIELD(num_ranks)
                        DT_FIELD(num_local_ranks) DT_FIELD(num_experts) DT_FIELD(alignment) DT_FIELD(expert_layout)
                            DT_FIELD(row_words);
    }
    {
        using P = PackParams;
        py::class_<P>(m, "PackParams")
            .def(py::init<>()) DT_FIELD(is_token_in_rank) DT_FIELD(topk_idx) DT_FIELD(topk_weights) DT_FIELD(place)
                DT_FIELD(send_at) DT_FIELD(words) DT_FIELD(token) DT_FIELD(num_tokens) DT_FIELD(top_k) DT_FIELD(num_ranks)
                    DT_FIELD(num_nodes) DT_FIELD(row_words);
    }
    {
        using P = SlotParams;
        py::class_<P>(m, "SlotParams")
            .def(py::init<>()) DT_FIELD(addresses) DT_FIELD(recv_at) DT_FIELD(theirs) DT_FIELD(begin) DT_FIELD(slot)
                DT_FIELD(number) DT_FIELD(capacity) DT_FIELD(mask_at) DT_FIELD(num_nodes) DT_FIELD(num_local_ranks);
    }
    {
        using P = UnpackParams;
        py::class_<P>(m, "UnpackParams")
            .def(py::init<>()) DT_FIELD(words) DT_FIELD(received_upto) DT_FIELD(num_received) DT_FIELD(source)
                DT_FIELD(topk_idx) DT_FIELD(topk_weights) DT_FIELD(capacity) DT_FIELD(top_k) DT_FIELD(row_words)
                    DT_FIELD(num_ranks) DT_FIELD(first_expert) DT_FIELD(num_local_experts);
    }
    {
        using P = WeightParams;
        py::class_<P>(m, "WeightParams")
            .def(py::init<>()) DT_FIELD(by_pick) DT_FIELD(by_row) DT_FIELD(pick_row) DT_FIELD(num_picks) DT_FIELD(num_rows)
                DT_FIELD(back);
    }
    m.attr("head_words") = kHead;
    m.attr("found_words") = int{kFoundWords};
    m.attr("report_head") = kReportHead;
}

}  // namespace

PYBIND11_MODULE(_rdma, m) {
    m.doc() = "deepep_train's kernels between nodes, over NVSHMEM";
    py::module_::import("deepep_train._C");  // has the low-latency calls' arguments
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    {
        using P = RailParams;
        py::class_<P>(m, "RailParams")
            .def(py::init<>()) DT_FIELD(rows) DT_FIELD(token) DT_FIELD(send_at) DT_FIELD(recv_at) DT_FIELD(addresses)
                DT_FIELD(beside) DT_FIELD(beside_addresses) DT_FIELD(beside_bytes) DT_FIELD(row_bytes) DT_FIELD(recv_offset)
                    DT_FIELD(signature) DT_FIELD(goes) DT_FIELD(rows_per_put) DT_FIELD(first_turn) DT_FIELD(end_turn)
                        DT_FIELD(num_sms);
    }
    {
        using P = SumParams;
        py::class_<P>(m, "SumParams")
            .def(py::init<>()) DT_FIELD(out) DT_FIELD(bias_0) DT_FIELD(bias_1) DT_FIELD(place) DT_FIELD(recv_at)
                DT_FIELD(row_bytes) DT_FIELD(num_tokens) DT_FIELD(dtype) DT_FIELD(num_sms);
    }
    bind_fresh(m);
    py::class_<Failure>(m, "Failure")
        .def_readonly("number", &Failure::number)
        .def_readonly("cause", &Failure::cause)
        .def_readonly("ranks", &Failure::ranks);
    py::class_<Endpoint>(m, "Endpoint")
        .def(py::init<int, int, int, int, int64_t, int, double, uint64_t>(), py::arg("device"), py::arg("rank"),
             py::arg("num_ranks"), py::arg("num_local_ranks"), py::arg("segment_bytes"), py::arg("num_qps"),
             py::arg("timeout_seconds"), py::arg("node_failed"), no_gil)
        .def("resize", &Endpoint::resize, no_gil)
        .def_property_readonly("send", &Endpoint::send)
        .def_property_readonly("recv", &Endpoint::recv)
        .def_property_readonly("segment_bytes", &Endpoint::segment_bytes)
        .def_property_readonly("failed_flag", &Endpoint::failed_flag)
        .def("refuse", &Endpoint::refuse)
        .def("rail", &Endpoint::rail)
        .def("sum", &Endpoint::sum)
        .def("tell", &Endpoint::tell)
        .def("digest", &Endpoint::digest)
        .def("pack_words", &Endpoint::pack_words)
        .def("find_slots", &Endpoint::find_slots)
        .def("unpack_words", &Endpoint::unpack_words)
        .def("move_weights", &Endpoint::move_weights)
        .def_property_readonly("put_bytes", &Endpoint::put_bytes)
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
