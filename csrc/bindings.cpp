// What Python sees of the kernels: plain addresses, sizes and streams. No torch header is included, so one build serves every
// version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "nvlink/communicator.hpp"

namespace py = pybind11;
using namespace deepep_train::nvlink;

namespace {

using Offsets = std::array<int64_t, 5>;

template <typename Params>
auto offsets_property() {
    return std::make_pair(
        [](const Params& p) {
            Offsets o{};
            std::copy(std::begin(p.offsets), std::end(p.offsets), o.begin());
            return o;
        },
        [](Params& p, const Offsets& o) { std::copy(o.begin(), o.end(), std::begin(p.offsets)); });
}

#define DT_FIELD(name) .def_readwrite(#name, &P::name)

void bind_params(py::module_& m) {
    {
        using P = LayoutParams;
        py::class_<P>(m, "LayoutParams")
            .def(py::init<>()) DT_FIELD(topk_idx) DT_FIELD(num_tokens_per_rank) DT_FIELD(num_tokens_per_expert)
                DT_FIELD(is_token_in_rank) DT_FIELD(send_index) DT_FIELD(out_of_range) DT_FIELD(num_tokens) DT_FIELD(top_k)
                    DT_FIELD(num_experts) DT_FIELD(num_ranks);
    }
    {
        using P = CountParams;
        py::class_<P>(m, "CountParams")
            .def(py::init<>()) DT_FIELD(num_tokens_per_rank) DT_FIELD(num_tokens_per_expert) DT_FIELD(out_of_range)
                DT_FIELD(rank_prefix_matrix) DT_FIELD(send_base) DT_FIELD(signature) DT_FIELD(bound) DT_FIELD(status)
                    DT_FIELD(num_experts);
    }
    {
        using P = DispatchParams;
        const auto offsets = offsets_property<P>();
        py::class_<P>(m, "DispatchParams")
            .def(py::init<>())
            .def_property("offsets", offsets.first, offsets.second) DT_FIELD(x) DT_FIELD(scales) DT_FIELD(topk_idx)
                DT_FIELD(topk_weights) DT_FIELD(send_index) DT_FIELD(send_base) DT_FIELD(signature) DT_FIELD(row_bytes)
                    DT_FIELD(scale_row_stride) DT_FIELD(scale_word_stride) DT_FIELD(num_tokens) DT_FIELD(send_sources)
                        DT_FIELD(scale_words) DT_FIELD(top_k) DT_FIELD(num_local_experts) DT_FIELD(num_sms);
    }
    {
        using P = CombineParams;
        const auto offsets = offsets_property<P>();
        py::class_<P>(m, "CombineParams")
            .def(py::init<>())
            .def_property("offsets", offsets.first, offsets.second) DT_FIELD(out) DT_FIELD(out_weights) DT_FIELD(bias_0)
                DT_FIELD(bias_1) DT_FIELD(send_index) DT_FIELD(send_base) DT_FIELD(signature) DT_FIELD(row_bytes)
                    DT_FIELD(num_tokens) DT_FIELD(top_k) DT_FIELD(dtype) DT_FIELD(num_sms);
    }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "deepep_train's CUDA kernels";
    bind_params(m);
    py::class_<CountResult>(m, "CountResult")
        .def_readonly("bad", &CountResult::bad)
        .def_readonly("per_rank", &CountResult::per_rank)
        .def_readonly("per_expert", &CountResult::per_expert)
        .def_readonly("bounds", &CountResult::bounds);
    py::class_<Failure>(m, "Failure")
        .def_readonly("epoch", &Failure::epoch)
        .def_readonly("operation", &Failure::operation)
        .def_readonly("meeting", &Failure::meeting)
        .def_readonly("missing", &Failure::missing)
        .def_readonly("mismatched", &Failure::mismatched)
        .def_readonly("refused", &Failure::refused);
    py::class_<Communicator>(m, "Communicator")
        .def(py::init<int, int, int, int64_t, double>(), py::arg("device"), py::arg("rank"), py::arg("num_ranks"),
             py::arg("arena_bytes"), py::arg("timeout_seconds"))
        .def_static("control_bytes", &Communicator::control_bytes)
        .def("ipc_handle", [](const Communicator& c) { return py::bytes(c.ipc_handle()); })
        .def_property_readonly("base", &Communicator::base)
        .def_property_readonly("bytes", &Communicator::bytes)
        .def_property_readonly("used", &Communicator::used)
        .def_property_readonly("peak", &Communicator::peak)
        .def("open",
             [](Communicator& c, const std::vector<std::pair<py::bytes, uint64_t>>& peers) {
                 std::vector<PeerAddress> addresses;
                 for (const auto& [handle, base] : peers) addresses.push_back({static_cast<std::string>(handle), base});
                 c.open(addresses);
             })
        .def("close", &Communicator::close, py::call_guard<py::gil_scoped_release>())
        .def("enter_pool", &Communicator::enter_pool)
        .def_static("leave_pool", &Communicator::leave_pool)
        .def("layout", &Communicator::layout)
        .def("count", &Communicator::count)
        .def("wait_counts", &Communicator::wait_counts, py::call_guard<py::gil_scoped_release>())
        .def("dispatch", &Communicator::dispatch)
        .def("combine", &Communicator::combine)
        .def("failure", &Communicator::failure);
}
