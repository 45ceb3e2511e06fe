"""This module says, before anything is started, what a run will take: memory, tokens, operations, hours and disk.

The model's sizes are those of the real one, built on torch's meta device, where tensors have shapes and no memory. What
the encoder reads of a cell is estimated from the non-zeros of a sample of the split's cells (rows are shuffled, so the
first ones are a sample) and from the chances of training. Operations are counted as in ``train.arithmetic``; hours
follow from the device's and a share of them, or from steps that are timed here.

Shape letters used in this module:
    C  cells      M  measurements      X  x and y
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from store.errors import UsageError
from store.schema import measured_column
from store.snapshot import Snapshot, open_snapshot
from train import checkpoint
from train.arithmetic import DEVICES, Seen, linear, operations, rounds
from train.assembly import AdaptedParts, Parts, parts_of
from train.blocks import Block
from train.cells import CONTROL, NUMBERS, PROMPTS, Cells, Csr
from train.config import ModelConfig
from train.labels import Labels, read_labels
from train.likelihood import Likelihood
from train.loop import n_parts
from train.model import CellModel, Decoder
from train.novelty import FEWEST, HELD_OUT_CELLS, REFERENCE_CELLS
from train.objective import Objective
from train.settings import RunSettings
from train.sources import Source, find_sources
from train.tokens import TokenSettings

MFU = 0.35
"""Share of a GPU's arithmetic that training is taken to use, where nobody says otherwise."""
SAMPLED_CELLS = 2**16
DRAWS = 2**17
"""Cells' chances that are drawn at least."""
USABLE = 0.9
"""Share of a device's memory that tensors can have: its context, its libraries and the allocator take the rest."""
STEPS = 3
"""Steps that are timed, after one that is not."""
MEASURED_OPERATIONS = {"cpu": 2e11, "cuda": 1e14}
"""About what a timed step may have; larger steps are timed on fewer of their cells."""
BYTES = 4
"""Of a weight, a gradient, a moment: all are single precision, whatever ``precision`` says."""
HELD = {("cpu", False): 104, ("cpu", True): 74, ("cuda", False): 88, ("cuda", True): 58}
"""Bytes that a block keeps for its backward pass, of each token and unit of width, in single and in half precision.

Counted on CPU; for CUDA worked out from that, where attention keeps no padded copies and norms keep less.
"""
READ = {("cpu", False): 28, ("cpu", True): 20, ("cuda", False): 24, ("cuda", True): 16}
"""The same of each token that queries read in a block of the query decoder."""
COMPARED: dict[Likelihood, float] = {
    "negative binomial": 24,
    "poisson": 15,
    "bernoulli": 10,
    "beta-binomial": 34.5,
    "gaussian": 15.5,
}
"""Bytes that a likelihood keeps of each cell and feature."""
WRAPPING = 1800
"""Bytes that a saved tensor takes beside its values."""
STEM = 928
"""Bytes that reading a base of a feature's window keeps."""


@dataclass(frozen=True)
class Parameters:
    """How many weights there are.

    Attributes:
        all: Of them.
        learn: Where a checkpoint is adapted, the adapter's; else all.
        blocks: Of blocks.
        tables: Of what has rows for features or labels.
    """

    all: int
    learn: int
    blocks: int
    tables: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    Attributes:
        weights: The weights, or the worker's part of them.
        gradients: Their gradients.
        moments: The two moments of AdamW.
        copies: Of gradients, in the buckets in which they are exchanged, and of weights in half precision; under FSDP,
            of weights that are gathered and of gradients before they are shared out.
        known: What is known of features, and which of them each dataset measures.
        activations: What the forward pass of a step keeps for the backward pass, at its peak.
        device: All of these.
        windows: Decoded windows of the stream, in the host's memory.
        staged: A copy of the training state while it is written, in the host's memory.
    """

    weights: int
    gradients: int
    moments: int
    copies: int
    known: int
    activations: int
    device: int
    windows: int
    staged: int


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        device: Where the hours are spent.
        width: Of the model.
        parameters: Of the model.
        memory: Of one worker.
        cells: Cells of the split, each of which comes once in an epoch.
        workers: That train.
        cells_per_step: Over all workers.
        steps_per_epoch: Steps until each cell came once.
        tokens_per_step: Features that the encoder sees in a step, over all workers, as metrics.jsonl counts them.
        tokens_per_epoch: The same of an epoch.
        epochs: That ``steps`` make.
        operations: Floating point operations of a step, over all workers.
        seconds_per_step: How long it takes.
        hours: How long ``steps`` take.
        mfu: Share of the device's arithmetic that is taken to be used; None where steps were timed.
        checkpoint_bytes: Of what is served.
        state_bytes: Of a training state.
        states_kept: How many of them are kept.
        assumptions: Sentences: what was taken for granted.
        warnings: Sentences: what will not work, and what to do.
    """

    device: str
    width: int
    parameters: Parameters
    memory: Memory
    cells: int
    workers: int
    cells_per_step: int
    steps_per_epoch: int
    tokens_per_step: float
    tokens_per_epoch: float
    epochs: float
    operations: float
    seconds_per_step: float
    hours: float
    mfu: float | None
    checkpoint_bytes: int
    state_bytes: int
    states_kept: int
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]


def plan(settings: RunSettings, device: str = "h100", *, mfu: float | None = None, measure: bool = False) -> Plan:
    """Say what a run will take; nothing is written and nothing started.

    Args:
        settings: The run's.
        device: One of ``DEVICES``, or "cpu".
        mfu: Share of the device's arithmetic that is used; ``MFU`` when left out.
        measure: Time some steps on this machine instead; a CPU is always timed.

    Raises:
        MissingError: No lake, snapshot or file of knowledge.
        InputRefused: The checkpoint that the run adapts is damaged.
        UsageError: The device is unknown, the split has no cell, the snapshot's features are not those of the
            checkpoint that the run adapts, or ``mfu`` or "fp16" is said where steps are timed on a CPU.
    """
    timed = measure or device == "cpu"
    if device not in (*DEVICES, "cpu"):
        raise UsageError(f"device {device!r} is none of: {', '.join((*DEVICES, 'cpu'))}")
    if timed and mfu is not None:
        raise UsageError(f"mfu={mfu} has no meaning where steps are timed (--measure, --device cpu); leave one out")
    data, snapshot = settings.data, open_snapshot(settings.lake, settings.snapshot)
    sources = find_sources({snapshot: 1.0}, data.split, sets=data.sets)
    base = checkpoint.load(settings.adapter.base) if settings.adapter.base else None
    labels = read_labels(snapshot, data.split, None if base is None else base.prompts)
    parts = parts_of(settings, snapshot, labels, base)
    config, model = parts.config, parts.skeleton()
    sample = sample_cells(sources, tuple(config.n_features), snapshot.measurements)
    most_M = np.array(list(config.n_features.values()))
    sample = replace(sample, nonzero_MC=np.minimum(sample.nonzero_MC, most_M[:, None]))  # a base knows no more
    tokens = parts.tokens(settings)
    seen = look_at(sample, config, tokens, data.queries, settings.seed)
    share = share_of(settings, sources)
    panels = len(snapshot.datasets) * sum(config.n_features.values())
    memory = memory_of(model, seen, settings, device, share.at_once, panels)
    if timed:
        seconds, how = _timed(settings, parts, sample, operations(model, seen), share, device)
    else:
        seconds, how = _at_peak(settings, model, seen, device, mfu or MFU, share.step)
    steps_per_epoch = -(-sum(one.n_units for one in sources) // data.global_batch)
    values = [part.nbytes for part in model.state_dict().values()]
    return Plan(
        device=device,
        width=config.width,
        parameters=count_parameters(model),
        memory=memory,
        cells=share.epoch,
        workers=settings.workers,
        cells_per_step=share.step,
        steps_per_epoch=steps_per_epoch,
        tokens_per_step=seen.tokens * share.step,
        tokens_per_epoch=seen.tokens * share.epoch,
        epochs=settings.steps / steps_per_epoch,
        operations=operations(model, seen) * share.step,
        seconds_per_step=seconds,
        hours=seconds * settings.steps / 3600,
        mfu=None if timed else mfu or MFU,
        checkpoint_bytes=(
            sum(values) + _words(parts, labels) + _reference(settings, snapshot, share.epoch, config.width)
            if base is None
            else BYTES * count_parameters(model).learn
        ),
        state_bytes=_state_bytes(model),
        states_kept=settings.keep_last + settings.keep_best,
        assumptions=(*_assumptions(settings, sample, share), *how),
        warnings=(
            *_warnings(settings, device, memory, share, timed=timed),
            *_unseen(settings, parts),
            *_unused(settings, most_M),
        ),
    )


def _unseen(settings: RunSettings, parts: Parts | AdaptedParts) -> list[str]:
    """Say of which features an adapter will not learn."""
    unseen = parts.unseen if isinstance(parts, AdaptedParts) else {}
    return [
        f"{settings.snapshot}: {n:,} features of {name} come after those of {settings.adapter.base}, which knows "
        "none of them: an adapter learns without; train.grow.grow makes a base that knows them"
        for name, n in unseen.items()
    ]


def _unused(settings: RunSettings, features_M: NDArray[np.int64]) -> list[str]:
    """Say that a cell has no use for all the tokens that were asked for; the usual number is none that was."""
    asked, most = settings.data.tokens, int(features_M.sum())
    if "tokens" not in settings.data.model_fields_set or asked <= most:
        return []
    return [f"data.tokens = {asked:,}: a cell has {most:,} features at most, and takes no more tokens"]


@dataclass(frozen=True)
class Share:
    """How many cells there are at a time.

    Attributes:
        epoch: In an epoch.
        step: In a step, over all workers.
        worker: In a worker's share of it.
        at_once: That a worker takes at once.
    """

    epoch: int
    step: int
    worker: int
    at_once: int


def share_of(settings: RunSettings, sources: Sequence[Source]) -> Share:
    """Return how many cells there are at a time, where batches may count sets of several cells."""
    n_cells, n_units = sum(one.n_rows for one in sources), sum(one.n_units for one in sources)
    batch = min(settings.data.global_batch, n_units)
    worker = math.ceil(batch / settings.workers)
    at_once = math.ceil(worker / n_parts(settings.data.micro_batch, batch, settings.workers))
    return Share(n_cells, *(math.ceil(units * n_cells / n_units) for units in (batch, worker, at_once)))


# ------------------------------------------------------------------------------------------------ what will be built
def count_parameters(model: CellModel) -> Parameters:
    """Count a model's weights; a measurement's decoder is a table of its features."""
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag | Decoder)]
    learn = sum(part.numel() for part in model.parameters() if part.requires_grad)
    return Parameters(_numel([model]), learn, _numel(blocks), _numel(tables))


def _numel(modules: Sequence[nn.Module]) -> int:
    return sum(part.numel() for module in modules for part in module.parameters())


def _reference(settings: RunSettings, snapshot: Snapshot, n_cells: int, width: int) -> int:
    """Return the bytes of the cells that a checkpoint keeps to tell novel ones by."""
    held_out = min(HELD_OUT_CELLS, snapshot.manifest["splits"].get(settings.data.test_split, 0))
    kept = min(REFERENCE_CELLS, n_cells)
    return BYTES * (kept * width + held_out) if min(kept, held_out) >= FEWEST else 0


def _words(parts: Parts | AdaptedParts, labels: Labels) -> int:
    """Return the bytes of a checkpoint's words."""
    prompts = {name: labels.values[name] for name in (*PROMPTS, "perturbation")}
    features = {name: asdict(part) for name, part in parts.vocabulary.items()}
    return len(json.dumps({"features": features, "prompts": prompts}))


# ---------------------------------------------------------------------------------------------------- what is read
@dataclass(frozen=True)
class Sample:
    """Some cells of the split.

    Attributes:
        nonzero_MC: Values that each holds in each measurement.
        measured_MC: Was it measured?
    """

    nonzero_MC: NDArray[np.int64]
    measured_MC: NDArray[np.bool_]


def sample_cells(sources: Sequence[Source], measurements: Sequence[str], there: Collection[str] = ()) -> Sample:
    """Look at the first cells of each source, in proportion to its cells; all of them where they are few.

    Args:
        sources: Where.
        measurements: What is looked for.
        there: Those that the sources have, where they do not have all.
    """
    have = [name for name in measurements if not there or name in there]
    place = [measurements.index(name) for name in have]
    n_cells, nonzero, measured = sum(one.n_rows for one in sources), [], []
    for source in sources:
        n_rows = min(source.n_rows, math.ceil(SAMPLED_CELLS * source.n_rows / n_cells))
        rows = source.rows(np.arange(n_rows))
        first, stop, part = int(rows[0]), int(rows[-1]) + 1, source.part
        nonzero_MC = np.zeros((len(measurements), len(rows)), np.int64)
        measured_MC = np.zeros((len(measurements), len(rows)), bool)
        nonzero_MC[place] = [np.diff(part.indptr(name, first, stop))[rows - first] for name in have]
        measured_MC[place] = part.codes([measured_column(name) for name in have], first, stop)[:, rows - first] > 0
        nonzero.append(nonzero_MC)
        measured.append(measured_MC)
    return Sample(np.concatenate(nonzero, axis=1), np.concatenate(measured, axis=1))


def look_at(sample: Sample, config: ModelConfig, tokens: TokenSettings, n_queries: int, seed: int) -> Seen:
    """Draw what is hidden of the cells, as training does, and count what is left of them."""
    draw = np.random.default_rng([seed, 6])
    again = max(1, DRAWS // sample.nonzero_MC.shape[1])
    measured_MC = np.repeat(sample.measured_MC, again, axis=1)
    nonzero_MC = np.repeat(sample.nonzero_MC, again, axis=1)
    shown_MC = measured_MC & (draw.random(nonzero_MC.shape) >= tokens.drop_measurement)
    share_MC = 1 - draw.uniform(*tokens.hide, nonzero_MC.shape)
    visible_MC = draw.binomial(nonzero_MC * shown_MC, share_MC).astype(np.float64)
    visible_MC *= np.minimum(1.0, tokens.budget / np.maximum(visible_MC.sum(0), 1))  # a budget is filled at random
    head = 1 + config.prompt_tokens + config.pathways
    piece_MC = config.bottlenecks * shown_MC + visible_MC
    place_C = head + piece_MC.sum(0)
    hub_C = head + config.bottlenecks * shown_MC.sum(0)
    each = max(1, n_queries // 2)
    size_M1 = np.array(list(config.n_features.values()), np.float64)[:, None]
    query_C = (measured_MC * (np.minimum(each, nonzero_MC - visible_MC) + each * (1 - nonzero_MC / size_M1))).sum(0)
    return Seen(
        cells=1,
        tokens=float(visible_MC.sum(0).mean()),
        places=float(place_C.mean()),
        hubs=float(hub_C.mean()),
        joint=float((place_C**2).mean()),
        within=float((head**2 + (piece_MC**2).sum(0)).mean()),
        between=float((hub_C**2).mean()),
        queries=float(query_C.mean()),
        read=float((query_C * place_C).mean()),
    )


# ---------------------------------------------------------------------------------------------------- what is held
def memory_of(
    model: CellModel, seen: Seen, settings: RunSettings, device: str, at_once: int, panels: int = 0
) -> Memory:
    """Return the memory of a worker that takes so many cells at once, and holds datasets' panels of so many bytes."""
    n_weights, n_learn, workers = count_parameters(model).all, count_parameters(model).learn, settings.workers
    shared, half = settings.parallel == "fsdp" and workers > 1, settings.precision != "no"
    own, learns = (BYTES * -(-n // (workers if shared else 1)) for n in (n_weights, n_learn))
    copies = 2 * sum(weight.numel() for weight in linear([model])) if half else 0
    if shared:  # tables stay whole for the whole step, blocks come one by one and one ahead
        block = _numel([model.blocks[0]])
        tables = n_weights - _numel([model.blocks, model.query_blocks])
        summed = n_weights if n_parts(settings.data.micro_batch, settings.data.global_batch, workers) > 1 else 0
        copies += BYTES * (tables + 2 * block + (summed or tables + 2 * block))
    elif workers > 1:
        copies += BYTES * n_learn
    where: Literal["cpu", "cuda"] = "cpu" if device == "cpu" else "cuda"
    kept = round(activations(model.config, seen, at_once, where, half=half, recompute=settings.recompute))
    staged = _state_bytes(model) // (workers if shared else 1)
    known = panels + sum(part.nbytes for part in model.buffers())
    total = own + learns + 2 * learns + copies + known + kept
    return Memory(own, learns, 2 * learns, copies, known, kept, total, settings.data.memory_mb * 2**20, staged)


def _state_bytes(model: CellModel) -> int:
    """Return the bytes of a training state: weights, what is known, two moments, and each tensor's wrapping."""
    values = [part.nbytes for part in model.state_dict().values()]
    n_tensors = len(values) + 3 * sum(part.requires_grad for part in model.parameters())
    return sum(values) + 2 * BYTES * count_parameters(model).learn + WRAPPING * n_tensors


def activations(
    config: ModelConfig, seen: Seen, n_cells: int, where: Literal["cpu", "cuda"], *, half: bool, recompute: bool = False
) -> float:
    """Return the bytes that the forward pass of so many cells keeps, and the backward pass needs beside them."""
    held, read, width = HELD[where, half], READ[where, half], config.width
    through = [n for n, _ in rounds(config, seen)]
    blocks = (BYTES * sum(through) + held * max(through)) if recompute else held * sum(through)
    blocks += config.query_layers * (held * seen.queries + read * seen.places) + held * config.pathways
    known = sum(config.frozen.values()) + 4 * config.bins
    tokens = 2 * BYTES * width * (seen.places + seen.tokens) + BYTES * known * seen.tokens
    compared = sum(COMPARED[config.likelihood_of(name)] * size for name, size in config.n_features.items())
    backward = BYTES * max(3.0 * sum(config.n_features.values()), 6.0 * width * seen.places)
    different = min(sum(config.n_features.values()), n_cells * (seen.tokens + seen.queries))
    return n_cells * (blocks * width + tokens + compared + backward) + STEM * config.window * different


# ---------------------------------------------------------------------------------------------------- how long it is
def _at_peak(
    settings: RunSettings, model: CellModel, seen: Seen, device: str, mfu: float, n_cells: int
) -> tuple[float, list[str]]:
    """Return the seconds of a step of so many cells, and what they rest on."""
    half = settings.precision != "no"
    peak = DEVICES[device].half if half else DEVICES[device].single
    done = operations(model, seen)
    said = [
        f"hours: {mfu:.0%} of the {peak / 1e12:,g} TFLOP/s of a {device} in precision {settings.precision!r} (dense, "
        "its maker's), no waiting for data or other workers, no evaluation"
    ]
    if settings.recompute:
        weights = sum(weight.numel() for weight in linear([model.blocks[0]]))
        done += sum(2.0 * weights * n + 4.0 * model.config.width * pairs for n, pairs in rounds(model.config, seen))
        said.append("recompute: the encoder's blocks go forward twice, which the operations of a step do not count")
    return done * n_cells / (settings.workers * peak * mfu), said


def _timed(
    settings: RunSettings, parts: Parts | AdaptedParts, sample: Sample, per_cell: float, share: Share, device: str
) -> tuple[float, list[str]]:
    """Time steps of the real model on made-up cells; return the seconds of a whole step, and what they rest on."""
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if where.type == "cpu" and settings.precision == "fp16":
        raise UsageError("precision = 'fp16' needs a GPU, and steps would be timed on a CPU; take 'bf16' or 'no'")
    n_timed = max(1, min(share.at_once, int(MEASURED_OPERATIONS[where.type] / per_cell)))
    n_threads = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(settings.threads)
    try:
        through, update = time_steps(settings, parts, made_up(settings, parts.config, sample, n_timed), where)
    finally:
        torch.set_num_threads(n_threads)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, threads = {settings.threads}"
    return through * share.worker / n_timed + update, [
        f"hours: timed on this machine ({name}), {STEPS} steps of {n_timed:,} made-up cells, in proportion for the "
        f"{share.worker:,} of a worker, as if workers ({settings.workers}) did not slow each other down; no waiting "
        "for data, no evaluation"
    ]


def made_up(settings: RunSettings, config: ModelConfig, sample: Sample, n_cells: int) -> Cells:
    """Return cells with as many non-zeros as the sample's have, of random features."""
    draw = np.random.default_rng([settings.seed, 7])
    which = np.arange(n_cells) % sample.nonzero_MC.shape[1]
    counts, measured = {}, {}
    for number, (name, size) in enumerate(config.n_features.items()):
        length_C = sample.nonzero_MC[number, which]
        rows = [np.sort(draw.choice(size, length, replace=False)) for length in length_C]
        indptr = np.concatenate([[0], np.cumsum(length_C)]).astype(np.int64)
        values = draw.integers(1, 20, indptr[-1])
        kind = np.float32 if name in config.levels else np.uint8
        counts[name] = Csr(indptr, np.concatenate(rows).astype(np.uint32), values.astype(kind))
        measured[name] = sample.measured_MC[number, which]
    return Cells(
        n_cells=n_cells,
        counts=counts,
        measured=measured,
        panel=np.zeros(n_cells, np.int32),
        prompts={name: draw.integers(0, size, n_cells).astype(np.int32) for name, size in config.n_prompts.items()},
        perturbation=np.full((n_cells, 1), CONTROL, np.int32),
        numbers={name: np.ones(n_cells, np.float32) for name in NUMBERS},
        row=np.arange(n_cells),
        set_C=np.arange(n_cells) // 32 if settings.data.sets else None,
        place_CX=draw.random((n_cells, 2), np.float32) if settings.data.sets else None,
    )


def time_steps(
    settings: RunSettings, parts: Parts | AdaptedParts, cells: Cells, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of forward and backward passes of the real model, and those of its optimizer; medians."""
    torch.manual_seed(settings.seed)
    model = parts.build().to(device)
    model.recompute = settings.recompute
    panels = {name: np.ones((1, size), bool) for name, size in parts.config.n_features.items()}
    objective = Objective(panels, parts.tokens(settings), settings.seed, device, settings.data.queries)
    learns = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learns, settings.optim.lr)
    kind = torch.float16 if settings.precision == "fp16" else torch.bfloat16

    def through() -> None:
        with torch.autocast(device.type, kind, enabled=settings.precision != "no"):
            loss, *_ = objective(model, model, cells, 0)
        torch.autograd.backward(loss.total / loss.pairs)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    seconds = [(_seconds(through, device), _seconds(update, device)) for _ in range(1 + STEPS)][1:]
    return statistics.median(one for one, _ in seconds), statistics.median(one for _, one in seconds)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


# ------------------------------------------------------------------------------------------------------ what is said
def _assumptions(settings: RunSettings, sample: Sample, share: Share) -> list[str]:
    """Say what was taken for granted, whatever the device."""
    n_sampled = sample.nonzero_MC.shape[1]
    cells = "all cells" if n_sampled == share.epoch else f"{n_sampled:,} of {share.epoch:,} cells"
    said = [
        f"tokens: from the non-zeros of {cells} of split {settings.data.split!r}; matched controls are taken to have "
        "as many as the cells that they stand in for",
        "operations: 6 for each weight and token, 12 for each unit of width and pair of tokens that read each other",
        f"activations: of {share.at_once:,} cells at once, packed without padding; weights, gradients and moments are "
        "single precision",
    ]
    if settings.parallel == "fsdp":
        said.append("fsdp: copies are a whole step's tables and two blocks, gathered, and their gradients")
    return said


def _warnings(settings: RunSettings, device: str, memory: Memory, share: Share, *, timed: bool) -> list[str]:
    """Say what will not work, and what to do."""
    said = []
    needed, have = memory.device, DEVICES[device].memory if device in DEVICES else 0.0
    if device == "cpu":
        needed = settings.workers * (memory.device + memory.windows + memory.staged)
        have = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > USABLE * have:
        whose = f"{settings.workers} workers on this machine" if device == "cpu" else f"a worker on a {device}"
        said.append(
            f"memory: {whose} would need {needed / 2**30:,.1f} GiB of {USABLE * have / 2**30:,.1f} GiB that can be "
            f"used; {_remedy(settings, memory, share)}"
        )
    if not timed and settings.precision == "no":
        peaks = DEVICES[device]
        said.append(
            f"precision = 'no': single precision has {peaks.single / peaks.half:.0%} of a {device}'s arithmetic; set "
            "precision = 'bf16'"
        )
    return said


def _remedy(settings: RunSettings, memory: Memory, share: Share) -> str:
    """Name what would lower the larger part of the memory, as far as it is not done yet."""
    if memory.activations < memory.device / 2:
        shared = settings.parallel == "fsdp" and settings.workers > 1
        way = "more workers" if shared else "parallel = 'fsdp' with several workers"
        return f"take {way}, or a smaller model.width"
    micro = f"a smaller micro batch (data.micro_batch; {share.at_once:,} cells at once now)"
    ways = [micro] * (share.at_once > 1) + ["recompute = true"] * (not settings.recompute)
    return f"take {', or '.join([*ways, 'fewer data.tokens'])}"


def as_json(found: Plan) -> dict[str, Any]:
    """Return a plan as plain values."""
    return asdict(found)


def lines(found: Plan) -> list[tuple[str, str]]:
    """Write a plan as pairs of what and how much, for people."""
    weights, memory = found.parameters, found.memory
    learning = "" if weights.learn == weights.all else f"; {weights.learn:,} learn"
    return [
        ("parameters", f"{weights.all:,}: {weights.blocks:,} in blocks, {weights.tables:,} in tables{learning}"),
        ("memory of a worker", f"{_size(memory.device)} on its device"),
        ("  weights", _size(memory.weights)),
        ("  gradients", _size(memory.gradients)),
        ("  AdamW's two moments", _size(memory.moments)),
        ("  copies", _size(memory.copies)),
        ("  what is known", _size(memory.known)),
        ("  activations", _size(memory.activations)),
        ("  on its host", f"{_size(memory.windows)} of windows, {_size(memory.staged)} while a state is written"),
        ("cells", f"{found.cells:,}, {found.cells_per_step:,} in a step"),
        ("steps of an epoch", f"{found.steps_per_epoch:,}"),
        ("tokens", f"{found.tokens_per_epoch:,.0f} in an epoch, {found.tokens_per_step:,.0f} in a step"),
        ("epochs", f"{found.epochs:,.2f}"),
        ("operations of a step", f"{found.operations:.3g}"),
        ("time", f"{found.hours:,.2f} h, {1000 * found.seconds_per_step:,.3g} ms a step"),
        ("checkpoint", _size(found.checkpoint_bytes)),
        ("training state", f"{_size(found.state_bytes)}, kept: {found.states_kept}"),
    ]


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:,.3g} {unit}" if unit != "B" else f"{n_bytes:,.0f} B"
        n_bytes /= 1024
    return f"{n_bytes:,.2f} GiB"
