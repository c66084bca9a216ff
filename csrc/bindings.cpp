// What Python sees of the kernels: plain addresses, sizes and streams. No torch header is included, so one build serves every
// version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "common/closings.hpp"
#include "common/on_device.hpp"
#include "fp8/kernels.hpp"
#include "low_latency/kernels.hpp"
#include "nvlink/beside.hpp"
#include "nvlink/communicator.hpp"

namespace py = pybind11;
using deepep_train::as_stream;
using namespace deepep_train::nvlink;

namespace {

// A params struct whose fields Python sets by name.
template <typename Params, typename... Bases>
class ParamsBinding {
public:
    ParamsBinding(py::module_& m, const char* name) : class_(m, name) { class_.def(py::init<>()); }

    template <typename Field, typename Base>  // the struct itself or its base
    ParamsBinding& field(const char* name, Field Base::* member) {
        class_.def_readwrite(name, member);
        return *this;
    }

    // Arrays are set as a whole.
    ParamsBinding& array(const char* name, int64_t (Params::*member)[5]) {
        using Values = std::array<int64_t, 5>;
        class_.def_property(
            name,
            [member](const Params& p) {
                Values values{};
                std::copy(std::begin(p.*member), std::end(p.*member), values.begin());
                return values;
            },
            [member](Params& p, const Values& values) { std::copy(values.begin(), values.end(), std::begin(p.*member)); });
        return *this;
    }

private:
    py::class_<Params, Bases...> class_;
};

#define DT_FIELD(name) .field(#name, &P::name)

void bind_params(py::module_& m) {
    {
        using P = Parts;
        ParamsBinding<P>(m, "Parts") DT_FIELD(at) DT_FIELD(num_parts) DT_FIELD(first) DT_FIELD(count);
    }
    {
        using P = DispatchParams;
        ParamsBinding<P>(m, "DispatchParams")
            .array("offsets", &P::offsets)
            .array("sizes", &P::sizes) DT_FIELD(x) DT_FIELD(row_from) DT_FIELD(scales_from) DT_FIELD(scales) DT_FIELD(topk_idx)
                DT_FIELD(topk_weights) DT_FIELD(send_slot) DT_FIELD(send_row) DT_FIELD(pick_row) DT_FIELD(signature)
                    DT_FIELD(rail_failed) DT_FIELD(num_tokens_at) DT_FIELD(parts) DT_FIELD(row_bytes) DT_FIELD(scale_row_stride)
                        DT_FIELD(scale_word_stride) DT_FIELD(num_tokens) DT_FIELD(send_sources) DT_FIELD(scale_words)
                            DT_FIELD(top_k) DT_FIELD(num_local_experts) DT_FIELD(num_sms);
    }
    {
        using P = ExpandParams;
        ParamsBinding<P>(m, "ExpandParams") DT_FIELD(x) DT_FIELD(source) DT_FIELD(scales) DT_FIELD(weights) DT_FIELD(indices)
            DT_FIELD(rows_of) DT_FIELD(row_slot) DT_FIELD(several) DT_FIELD(num_several) DT_FIELD(num_received)
                DT_FIELD(row_bytes) DT_FIELD(num_rows) DT_FIELD(scale_words) DT_FIELD(top_k) DT_FIELD(num_sms);
    }
    {
        using P = PlaceParams;
        ParamsBinding<P>(m, "PlaceParams") DT_FIELD(topk_idx) DT_FIELD(expert_base) DT_FIELD(pick_row) DT_FIELD(chunk_counts)
            DT_FIELD(num_tokens) DT_FIELD(top_k) DT_FIELD(num_experts) DT_FIELD(num_ranks);
    }
    {
        using P = ArrangeParams;
        ParamsBinding<P>(m, "ArrangeParams") DT_FIELD(rows_of) DT_FIELD(row_slot) DT_FIELD(num_received) DT_FIELD(num_rows)
            DT_FIELD(top_k) DT_FIELD(num_sms);
    }
    {
        using P = ScalesParams;
        ParamsBinding<P>(m, "ScalesParams") DT_FIELD(scales) DT_FIELD(slot_scales) DT_FIELD(row_slot) DT_FIELD(group_rows)
            DT_FIELD(num_received) DT_FIELD(num_words) DT_FIELD(num_rows) DT_FIELD(num_groups) DT_FIELD(scale_words)
                DT_FIELD(multiple) DT_FIELD(tokens_innermost) DT_FIELD(padding_word) DT_FIELD(num_sms);
    }
    {
        using P = ReduceParams;
        ParamsBinding<P>(m, "ReduceParams") DT_FIELD(y) DT_FIELD(partials) DT_FIELD(rows_of) DT_FIELD(tokens)
            DT_FIELD(num_tokens) DT_FIELD(row_bytes) DT_FIELD(top_k) DT_FIELD(dtype) DT_FIELD(num_sms);
    }
    {
        using P = CombineParams;
        ParamsBinding<P>(m, "CombineParams")
            .array("offsets", &P::offsets) DT_FIELD(y) DT_FIELD(out) DT_FIELD(out_weights) DT_FIELD(bias_0) DT_FIELD(bias_1)
                DT_FIELD(pull_row) DT_FIELD(send_slot) DT_FIELD(pick_row) DT_FIELD(pick_rank) DT_FIELD(signature)
                    DT_FIELD(num_tokens_at) DT_FIELD(parts) DT_FIELD(rail_failed) DT_FIELD(row_bytes) DT_FIELD(num_tokens)
                        DT_FIELD(top_k) DT_FIELD(dtype) DT_FIELD(num_sms);
    }
}

// Into a module of their own: operations here have the names that they have in the nvlink engine.
void bind_low_latency(py::module_ m) {
    namespace ll = deepep_train::low_latency;
    {
        using P = ll::Common;
        ParamsBinding<P>(m, "Common") DT_FIELD(spaces) DT_FIELD(own) DT_FIELD(arenas) DT_FIELD(mask) DT_FIELD(put_bytes)
            DT_FIELD(timeout_ns) DT_FIELD(rank) DT_FIELD(num_ranks) DT_FIELD(first_local) DT_FIELD(num_local)
                DT_FIELD(num_experts) DT_FIELD(max_tokens) DT_FIELD(hidden) DT_FIELD(top_k) DT_FIELD(set) DT_FIELD(num_sms);
    }
    {
        using P = ll::DispatchParams;
        ParamsBinding<P, ll::Common>(m, "DispatchParams") DT_FIELD(x) DT_FIELD(topk_idx) DT_FIELD(pick_index)
            DT_FIELD(bad_index) DT_FIELD(num_tokens) DT_FIELD(scales) DT_FIELD(keep) DT_FIELD(recv_x) DT_FIELD(recv_scales)
                DT_FIELD(src_info) DT_FIELD(ranges) DT_FIELD(recv_count) DT_FIELD(cumulative) DT_FIELD(wait_ns);
    }
    {
        using P = ll::CombineParams;
        ParamsBinding<P, ll::Common>(m, "CombineParams") DT_FIELD(y) DT_FIELD(zero_copy) DT_FIELD(logfmt) DT_FIELD(out)
            DT_FIELD(topk_idx) DT_FIELD(topk_weights) DT_FIELD(pick_index) DT_FIELD(wait_ns) DT_FIELD(num_tokens);
    }
    m.def("space_bytes", &ll::space_bytes);
    m.def("control_bytes", &ll::control_bytes);
    m.def("closed_offset", &ll::closed_offset);
    m.def("forget", [=](const ll::Common& c, int peer, uint64_t s) { ll::launch_forget(c, peer, as_stream(s)); });
    m.attr("slice_bytes") = ll::kSlice;
    m.attr("slices_in_flight") = ll::kTurns;
    m.attr("max_ranks") = ll::kMaxRanks;
    m.attr("max_experts") = ll::kMaxExperts;
    m.attr("max_top_k") = ll::kMaxTopK;
    m.attr("max_hidden") = ll::kMaxHidden;
    m.def("dispatch_send", [=](const ll::DispatchParams& p, uint64_t s) { ll::launch_dispatch_send(p, as_stream(s)); });
    m.def("dispatch_receive", [=](const ll::DispatchParams& p, uint64_t s) { ll::launch_dispatch_receive(p, as_stream(s)); });
    m.def("combine_send", [=](const ll::CombineParams& p, uint64_t s) { ll::launch_combine_send(p, as_stream(s)); });
    m.def("combine_slices", [=](const ll::CombineParams& p, uint64_t s) { ll::launch_combine_slices(p, as_stream(s)); });
    m.def("most_tokens_in_slices", &ll::most_tokens_in_slices);
    m.def("combine_receive", [=](const ll::CombineParams& p, uint64_t s) { ll::launch_combine_receive(p, as_stream(s)); });
}

void bind_fp8(py::module_ m) {
    namespace fp8 = deepep_train::fp8;
    {
        using P = fp8::QuantizeParams;
        ParamsBinding<P>(m, "QuantizeParams") DT_FIELD(x) DT_FIELD(data) DT_FIELD(scales) DT_FIELD(num_rows) DT_FIELD(hidden)
            DT_FIELD(scale_row_stride) DT_FIELD(scale_step) DT_FIELD(min_amax) DT_FIELD(power_of_two) DT_FIELD(dtype)
                DT_FIELD(e5m2);
    }
    {
        using P = fp8::DequantizeParams;
        ParamsBinding<P>(m, "DequantizeParams") DT_FIELD(data) DT_FIELD(scales) DT_FIELD(out) DT_FIELD(num_rows)
            DT_FIELD(hidden) DT_FIELD(scale_row_stride) DT_FIELD(scale_step) DT_FIELD(values_per_scale) DT_FIELD(dtype)
                DT_FIELD(e5m2);
    }
    m.def("quantize", [=](const fp8::QuantizeParams& p, uint64_t s) { fp8::launch_quantize(p, as_stream(s)); });
    m.def("dequantize", [=](const fp8::DequantizeParams& p, uint64_t s) { fp8::launch_dequantize(p, as_stream(s)); });
}

void bind_tables(py::module_& m) {
    using T = Tables;
    py::class_<T>(m, "Tables")
        .def(py::init<int, int, int, int, bool, bool>(), py::arg("num_tokens"), py::arg("top_k"), py::arg("num_experts"),
             py::arg("num_ranks"), py::arg("expert_layout"), py::arg("counts_tokens"))
        .def_property_readonly("words", &T::words)
        .def("lay_out", &T::lay_out)
        .def_readwrite("num_tokens_per_rank", &T::num_tokens_per_rank)
        .def_readwrite("num_tokens_per_expert", &T::num_tokens_per_expert)
        .def_readonly("is_token_in_rank", &T::is_token_in_rank)
        .def_readwrite("checked", &T::checked)
        .def_readonly("tokens_per_expert", &T::tokens_per_expert)
        .def_readonly("rank_prefix_matrix", &T::rank_prefix_matrix)
        .def_readwrite("num_received", &T::num_received)
        .def_readonly("num_several", &T::num_several)
        .def_readonly("num_summed", &T::num_summed)
        .def_readwrite("send_slot", &T::send_slot)
        .def_readwrite("send_row", &T::send_row)
        .def_readwrite("pull_row", &T::pull_row)
        .def_readonly("pick_row", &T::pick_row)
        .def_readonly("pick_rank", &T::pick_rank)
        .def_readwrite("rows_of", &T::rows_of)
        .def_readwrite("row_slot", &T::row_slot)
        .def_readwrite("several", &T::several)
        .def_readwrite("summed", &T::summed);
}

void bind_beside(py::module_& m) {
    py::class_<Beside>(m, "Beside")
        .def(py::init<std::array<int, Beside::kParts>, bool>(), py::arg("widths"), py::arg("by_row"))
        .def("measure", &Beside::measure)
        .def_property_readonly("words", &Beside::words)
        .def_property_readonly("rooms", &Beside::rooms)
        .def("place", &Beside::place, py::arg("dispatch"), py::arg("rows"), py::arg("row_bytes"), py::arg("beside"),
             py::arg("scales") = 0, py::arg("scale_bytes") = 0);
}

void bind_results(py::module_& m) {
    py::class_<CountResult>(m, "CountResult")
        .def_readonly("bad", &CountResult::bad)
        .def_readonly("num_received", &CountResult::num_received)
        .def_readonly("num_rows", &CountResult::num_rows)
        .def_property_readonly("per_expert",
                               [](const CountResult& c) {  // a buffer: a list would cost a conversion of every number, twice
                                   const auto* first = reinterpret_cast<const char*>(c.per_expert.data());
                                   return py::bytearray(first, c.per_expert.size() * sizeof(int64_t));
                               })
        .def_readonly("rows", &CountResult::rows)
        .def_readonly("bounds", &CountResult::bounds);
    py::class_<Failure>(m, "Failure")
        .def_readonly("epoch", &Failure::epoch)
        .def_readonly("operation", &Failure::operation)
        .def_readonly("meeting", &Failure::meeting)
        .def_readonly("cause", &Failure::cause)
        .def_readonly("ranks", &Failure::ranks)
        .def_readonly("rows", &Failure::rows)
        .def_readonly("bounds", &Failure::bounds)
        .def_readonly("bytes", &Failure::bytes);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "deepep_train's CUDA kernels";
    m.attr("place_chunks") = kChunks;
#ifdef DEEPEP_TRAIN_DEBUG
    m.attr("is_debug") = true;  // see docs/kernels.md
#else
    m.attr("is_debug") = false;
#endif
    bind_params(m);
    bind_tables(m);
    bind_beside(m);
    bind_results(m);
    bind_low_latency(m.def_submodule("low_latency"));
    bind_fp8(m.def_submodule("fp8"));
    py::class_<deepep_train::Closings, std::shared_ptr<deepep_train::Closings>>(m, "Closings")
        .def(py::init<int>(), py::arg("num_ranks"))
        .def(py::init<int, int, int>(), py::arg("num_ranks"), py::arg("pid"), py::arg("descriptor"))
        .def_property_readonly("descriptor", &deepep_train::Closings::descriptor)
        .def("seal", &deepep_train::Closings::seal)
        .def("say", &deepep_train::Closings::say)
        .def("all", &deepep_train::Closings::all);
    using C = Communicator;
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<C>(m, "Communicator")
        .def(py::init<int, int, int, int64_t, double>(), py::arg("device"), py::arg("rank"), py::arg("num_ranks"),
             py::arg("arena_bytes"), py::arg("timeout_seconds"))
        .def_static("control_bytes", &C::control_bytes)
        .def_static("has_mps", &C::has_mps)
        .def_static("obstacle", &C::obstacle)
        .def("ipc_handle", [](const C& c) { return py::bytes(c.ipc_handle()); })
        .def_property_readonly("base", &C::base)
        .def_property_readonly("bytes", &C::bytes)
        .def_property_readonly("used", &C::used)
        .def_property_readonly("peak", &C::peak)
        .def("open",
             [](C& c, const std::vector<std::tuple<py::bytes, uint64_t, int>>& peers) {
                 std::vector<PeerAddress> addresses;
                 for (const auto& [handle, base, device] : peers)
                     addresses.push_back({static_cast<std::string>(handle), base, device});
                 c.open(addresses);
             })
        .def("addresses", &C::addresses)
        .def("share", &C::share)
        .def("close", &C::close, py::arg("keep") = false, no_gil)
        .def("enter_pool", &C::enter_pool)
        .def_static("leave_pool", &C::leave_pool)
        .def("begin_settling", &C::begin_settling)
        .def("settle", &C::settle)
        .def("enter", &C::enter)
        .def("leave", &C::leave)
        .def("layout", &C::layout)
        .def("route", &C::route)
        .def("route_nothing", &C::route_nothing)
        .def("counts_come", &C::counts_come)
        .def("counts", &C::counts)
        .def(
            "wait_counts",
            [](const C& c, uint32_t ticket, uint64_t stream) {
                c.wait_counts(ticket, stream, [] {
                    const py::gil_scoped_acquire gil;
                    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                });
            },
            no_gil)
        .def("dispatch", &C::dispatch)
        .def("refuse", &C::refuse)
        .def("arrange", &C::arrange)
        .def("place_picks", &C::place_picks)
        .def("arrange_rows", &C::arrange_rows)
        .def("expand", &C::expand)
        .def("scales", &C::scales)
        .def("reduce", &C::reduce)
        .def("combine", &C::combine)
        .def_property_readonly("failed_flag", &C::failed_flag)
        .def("is_well", &C::is_well)
        .def("cuda_error", &C::cuda_error)
        .def("failure", &C::failure);
}
