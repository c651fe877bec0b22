"""The figures that `python -m tests.distributed.table` has measured, engine by engine, with what to write for each."""

from __future__ import annotations

import json
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "generated" / "engines.json"
WHAT_TO_WRITE = {
    "DDP": "nothing",
    "FSDP2": "nothing",
    "HSDP": "nothing",
    "context parallel": "nothing; chunks of whole windows",
    "a share of a loss": "`scaled_by=own tokens / all tokens`",
    "declared Shard(1)": '`placements=(mesh["tp"], Shard(1))`: blocks that return plain parts of the sequence',
    "declared Shard(0)": '`placements=(mesh["tp"], Shard(0))`: parts of the batch that share a loss',
    "declared Shard(-1)": '`placements=(mesh["tp"], Shard(-1))`: column-parallel outputs, `w1`, `wq`',
    "DTensor Replicate": "nothing",
    "DTensor Shard(0)": "nothing",
    "DTensor Shard(1)": "nothing",
    "DTensor Shard(-1)": "nothing",
    "two dimensions of a mesh": "nothing for DTensors; `(mesh, (Shard(1), Shard(-1)))` for plain parts",
    "a copied dimension": "nothing for DTensors; `(mesh, (Replicate(), Shard(1)))` for plain parts",
    "sequence first": '`placements=(mesh["tp"], Shard(0))`, `layout="length batch features"`',
    "loss_parallel": "nothing; the backward pass inside of it",
    "FSDP2 x TP": "as for tensor parallel",
    "windows across parts": "nothing; parts are put together, and told",
    "masked parts": "nothing; parts are put together, and told",
    "GPipe": "`loss_fn=pipelined(optimizer, stage, loss_fn)`",
    "1F1B": "the same",
    "interleaved 1F1B": "the same, with all stages of the rank",
    "zero bubble": "the same",
    "zero bubble in a V": "the same",
    "1F1B x data": "the same",
    "FSDP2 x TP x 1F1B": "the same, and as for tensor parallel",
    "experts without tokens": "nothing",
    "a rank without a loss": "nothing",
    **{f"ZeRO {stage}, {precision}": "`connect(engine)`" for stage in range(4) for precision in ("fp32", "bf16")},
    "torchtitan, partial_dtensor": "`scaled_by=own tokens / all tokens`",
    "torchtitan, full_dtensor": "nothing",
    "Megatron-Core, sequence parallel": '`placements=(mesh, Shard(0))`, `layout="length batch features"`',
    "Megatron-Core, column-parallel": "`placements=(mesh, Shard(-1))`, the same layout",
}


def engines() -> str:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    lines = [
        "| What spreads the model | What you write | Ranks | Gradients | Entropies | Phases | Resume | Sent per step |",
        "|---|---|---:|---:|---:|---|---|---:|",
    ]
    for name, text in WHAT_TO_WRITE.items():
        f = figures[name]
        lines.append(
            f"| {name} | {text} | {f['ranks']} | {f['gradients']:.0e} | {f['entropies']:.0e} | "
            f"{'same' if f['phases'] else 'others'} | {'same' if f['resumed'] else 'others'} | "
            f"{f['collectives']}: {f['bytes']:,} B |"
        )
    return "\n".join(lines)
