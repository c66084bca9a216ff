"""`plan`: times, bytes and buffers of dispatch and combine on a cluster, predicted from link rates; needs no GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from deepep_train.cli import plan_model as model

_MOST_METADATA = 0.02  # of the rows' bytes on the network; more is pointed out


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("plan", help=__doc__, description=__doc__)
    work = model.Work(1)
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the expert-parallel group")
    parser.add_argument("--gpus-per-node", type=int, default=work.gpus_per_node, help="default %(default)s")
    parser.add_argument("--num-tokens", "--tokens", type=int, default=work.num_tokens, help="of each GPU; %(default)s")
    parser.add_argument("--hidden", type=int, default=work.hidden, help="elements of a row; %(default)s")
    parser.add_argument("--num-experts", "--experts", type=int, default=work.num_experts, help="of all GPUs; %(default)s")
    parser.add_argument("--num-topk", "--top-k", type=int, default=work.num_topk, help="experts of a token; %(default)s")
    parser.add_argument("--num-groups", type=int, default=0, help="groups of experts among which the router chooses; 0: none")
    parser.add_argument("--num-topk-groups", type=int, default=0, help="groups that a token's experts lie in")
    parser.add_argument("--dispatch-dtype", choices=model.DTYPES, default=work.dispatch_dtype, help="default %(default)s")
    parser.add_argument("--stages", type=int, default=work.stages, help="of the rail, DEEPEP_TRAIN_RAIL_STAGES; %(default)s")
    parser.add_argument("--gpu", choices=sorted(model.NVLINK_RATES), default="h100", help="whose NVLink; default %(default)s")
    parser.add_argument("--nvlink-gbs", type=_rate, help="GB/s one way that rows reach over NVLink, instead of the GPU's")
    parser.add_argument("--rdma-gbs", type=_rate, help="GB/s one way that rows reach over a GPU's network card")
    parser.add_argument("--validate", action="store_true", help="compare the model with published tables instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.validate:
        compared = model.validate()
        print(json.dumps([asdict(row) for row in compared], indent=2) if args.json else validation_text(compared))
        return 0
    work = model.Work(
        args.nodes,
        args.gpus_per_node,
        args.num_tokens,
        args.hidden,
        args.num_experts,
        args.num_topk,
        args.num_groups,
        args.num_topk_groups,
        args.dispatch_dtype,
        args.stages,
    )
    hardware = model.Hardware(
        nvlink_rate=args.nvlink_gbs * 1e9 if args.nvlink_gbs else model.NVLINK_RATES[args.gpu] * model.NVLINK_SHARE,
        nic_rate=args.rdma_gbs * 1e9 if args.rdma_gbs else model.NIC_RATE * model.NIC_SHARE,
    )
    print(json.dumps(model.report(work, hardware), indent=2) if args.json else as_text(work, hardware))
    return 0


def as_text(work: model.Work, hardware: model.Hardware) -> str:
    groups = f" in {work.num_topk_groups} of {work.num_groups} groups" if work.num_groups else ""
    nodes, ranks = model.units_reached(work, work.nodes), model.units_reached(work, work.ranks)
    lines = [
        f"{work.nodes} nodes x {work.gpus_per_node} GPUs, {work.num_tokens} tokens x {work.hidden} a GPU, "
        f"top-{work.num_topk} of {work.num_experts} experts{groups}",
        f"a token reaches {nodes:.2f} nodes and {ranks:.2f} GPUs; rows reach {hardware.nvlink_rate / 1e9:.0f} GB/s over NVLink "
        f"and {hardware.nic_rate / 1e9:.0f} over a network card",
        "",
        f"{'a GPU, one way':18s} {'ms':>7s} {'RDMA ms':>8s} {'NVLink ms':>10s} {'RDMA MB':>9s} {'metadata':>9s}"
        f" {'NVLink MB':>10s} {'RDMA rows':>10s} {'SMs':>4s}",
    ]
    predicted = {operation: model.predict(work, hardware, operation) for operation in ("dispatch", "combine")}
    for (operation, p), dtype in zip(predicted.items(), (work.dispatch_dtype, "bf16"), strict=True):
        lines.append(
            f"{operation + ' ' + dtype:18s} {1e3 * p.seconds:7.2f} {1e3 * p.rdma_seconds:8.2f} {1e3 * p.nvlink_seconds:10.2f}"
            f" {p.rdma_bytes / 1e6:9.1f} {100 * p.metadata_share:8.1f}% {p.nvlink_bytes / 1e6:10.1f} {p.rdma_rows:10.0f}"
            f" {p.sms:4d}"
        )
    lines += [f"warning: {limit}" for limit in model.beyond_limits(work)]
    lines += [_warning(work, operation, p) for operation, p in predicted.items() if p.metadata_share > _MOST_METADATA]
    b = model.buffers(work)
    kept = f"received rows in bf16, for each dispatch whose backward is to come: {b.received / 2**20:.0f} MiB a GPU"
    lines += [
        "",
        f"{kept}; Buffer holds {b.arena / 2**20:.0f} MiB for them, a quarter as staging, unless num_nvl_bytes asks for more",
    ]
    if work.nodes > 1:
        if model.num_stages(work) == 1:
            more = "; --stages makes them overlap" if work.nodes > 2 else ""
            lines.append(f"The rdma engine uses the network, then NVLink: ms has both times{more}.")
        slots = "staging for the network, a slot for every (node, token)"
        lines.append(f"{slots}: num_rdma_bytes={b.staging}, {b.staging / 2**20:.0f} MiB a GPU")
        lines.append("The rdma engine has not run on a network card (docs/rdma.md): these are rates that DeepEP V1 reached.")
    return "\n".join(lines)


def _warning(work: model.Work, operation: str, p: model.Prediction) -> str:
    counts = model.row_of_counts(work, operation)
    return (
        f"warning: {operation}'s metadata are {100 * p.metadata_share:.1f}% of its rows' bytes on the network, above "
        f"{100 * _MOST_METADATA:.0f}%: {model.meta_bytes(work, operation)} bytes with each row"
        f'{f", {counts} of counts to each node" if counts else ""} (docs/rdma.md, "Missing")'
    )


def validation_text(compared: list[model.Compared]) -> str:
    lines = [
        "DeepEP V1's pipeline, in which network and NVLink work at once (this library's rdma engine uses one, then the other):",
        f"{'':14s} {'published GB/s':>15s} {'predicted GB/s':>15s} {'error of the time':>18s}",
    ]
    for row in compared:
        name = f"EP{row.ranks} {row.operation}"
        lines.append(f"{name:14s} {row.published:15.0f} {row.predicted:15.1f} {100 * row.error:17.1f}%")
    return "\n".join(lines)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number above 0")
    return value
