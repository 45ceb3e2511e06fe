"""How long a training step takes, and what share of the device's arithmetic it uses, by size, tokens and attention.

usage: make bench-step BENCH='--sizes small,base,large --tokens 2048,8192 --attention full,hybrid', or, with torch and
numpy only, as on a bare GPU machine: PYTHONPATH=. python tests/bench/bench_step.py ... The last line of output is one
JSON object; ``--page`` keeps the rows in docs/benchmarks/cases/step.json and writes docs/benchmarks/step.md from all.
Arithmetic is counted as in ``train.arithmetic``; the device's is what its maker says (dense).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from train.arithmetic import operations, peak_of
from train.cells import NUMBERS, PROMPTS, Cells, Csr
from train.config import ModelConfig
from train.model import CellModel
from train.objective import Objective
from train.tokens import TokenSettings

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "toy": {"width": 64, "layers": 4, "query_layers": 1, "heads": 4},
    "small": {"width": 256, "layers": 8, "query_layers": 2, "heads": 8},
    "base": {"width": 512, "layers": 12, "query_layers": 2, "heads": 8},
    "large": {"width": 1024, "layers": 24, "query_layers": 2, "heads": 16},
}
FEATURES = {"RNA": 20_000, "protein": 200}


def made_up(n_cells: int, tokens: int, seed: int) -> Cells:
    """Return cells with more non-zeros than tokens."""
    rng = np.random.default_rng(seed)
    counts = {}
    for name, size in FEATURES.items():
        per_cell = min(size, int(tokens * (1.6 if name == "RNA" else 0.1)))
        features = np.concatenate([np.sort(rng.choice(size, per_cell, replace=False)) for _ in range(n_cells)])
        indptr = np.arange(n_cells + 1, dtype=np.int64) * per_cell
        counts[name] = Csr(indptr, features.astype(np.uint32), rng.integers(1, 20, len(features)).astype(np.float32))
    return Cells(
        n_cells,
        counts,
        {name: np.ones(n_cells, bool) for name in FEATURES},
        np.zeros(n_cells, np.int32),
        {name: np.ones(n_cells, np.int32) for name in PROMPTS},
        np.ones((n_cells, 1), np.int32),
        {name: np.ones(n_cells, np.float32) for name in NUMBERS},
        np.arange(n_cells),
    )


def step_time(size: str, attention: str, budget: int, options: argparse.Namespace) -> dict[str, object]:
    """Return milliseconds a step, its share of the device's arithmetic, and the memory it takes."""
    device = torch.device(options.device)
    config = ModelConfig(
        FEATURES,
        dict.fromkeys(PROMPTS, 100),
        1000,
        attention=attention,
        n_terms=0,
        **SIZES[size],  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    model = CellModel(config).to(device)
    if options.compile:
        for block in (*model.blocks, *model.query_blocks):
            block.compile_dense()
    n_cells = max(1, options.batch_tokens // budget)
    cells = made_up(n_cells, budget, 0)
    settings = TokenSettings(budget=budget, hide=(0.0, 0.0), drop_measurement=0.0)
    panels = {name: np.ones((1, n_features), bool) for name, n_features in FEATURES.items()}
    objective = Objective(panels, settings, 0, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type == "cuda")
    seconds = []
    for step in range(options.warm + options.steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, n_tokens, _ = objective(model, model, cells, step)
        torch.autograd.backward(loss.total / loss.pairs)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    taken = statistics.median(seconds[options.warm :])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = peak_of(name, half=True)
    done = operations(model, objective.prepare(model, cells, 0).seen)
    return {
        "size": size,
        "attention": attention,
        "compiled": options.compile,
        "tokens_of_a_cell": budget,
        "cells": n_cells,
        "parameters": sum(part.numel() for part in model.parameters()),
        "of_them_in_blocks": sum(part.numel() for part in model.blocks.parameters()),
        "ms": 1000 * taken,
        "tokens_s": n_tokens / taken,
        "operations": done,
        "mfu": done / taken / peak if peak else None,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "device": name,
    }


INTRO = """# A training step

Written by `make bench-step BENCH='--page ...'`: the median of a step's time (tokens, forward, backward, AdamW) over
made-up cells of 20,000 genes and 200 proteins. Arithmetic is counted as in `train/arithmetic.py`; MFU is its share of
what the device's maker says that it can do, in bf16.

| device | size | weights | attention | tokens of a cell | cells | compiled | ms | tokens/s | MFU | memory |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def write_page(rows: list[dict[str, object]]) -> None:
    """Put rows beside those that are kept, in place of those of the same kind, and write the page."""
    kept = ROOT / "docs/benchmarks/cases/step.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    same = ("device", "size", "attention", "tokens_of_a_cell", "cells", "compiled")
    known |= {" ".join(str(row[key]) for key in same): row for row in rows}
    kept.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    lines = []
    for _, row in sorted(known.items()):
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = "-" if row["memory_gib"] is None else f"{row['memory_gib']:.1f} GiB"
        lines.append(
            f"| {row['device']} | {row['size']} | {row['parameters']:,} | {row['attention']} | "
            f"{row['tokens_of_a_cell']:,} | {row['cells']} | {'yes' if row['compiled'] else 'no'} | {row['ms']:.0f} | "
            f"{row['tokens_s']:,.0f} | {mfu} | {memory} |"
        )
    (ROOT / "docs/benchmarks/step.md").write_text(INTRO + "\n".join([*lines, ""]), encoding="utf-8")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default="toy")
    parser.add_argument("--tokens", default="256")
    parser.add_argument("--attention", default="full,hybrid")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a step, over all cells")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--page", action="store_true", help="keep the rows and write docs/benchmarks/step.md")
    options = parser.parse_args()
    rows = []
    for size in options.sizes.split(","):
        for budget in map(int, options.tokens.split(",")):
            for attention in options.attention.split(","):
                rows.append(step_time(size, attention, budget, options))
                print(json.dumps(rows[-1]), flush=True)
    if options.page:
        write_page(rows)
    print(json.dumps({"steps": rows}))


if __name__ == "__main__":
    main()
