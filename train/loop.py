"""This module is the training loop: Accelerate around a model, a stream in, metrics and checkpoints out.

It knows nothing of Ray: it runs in one process, under torchrun, and under Ray Train, which give it the process group.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from store.errors import ConflictError, UsageError, VerificationError
from store.snapshot import Snapshot, open_snapshot
from train import checkpoint
from train.card import write_card
from train.cells import PROMPTS, Cells
from train.checkpoint import Vocabulary
from train.config import ModelConfig
from train.controls import MatchedControls
from train.genome import locate, motif_sets, neighbours, read_motifs, read_regions, read_windows
from train.knowledge import Knowledge, gather_knowledge, read_aliases, read_sets, read_vectors
from train.labels import Labels, read_labels
from train.likelihood import COVERAGE
from train.model import CellModel
from train.objective import Objective
from train.ontology import type_terms
from train.settings import RunSettings
from train.start import begin, tell_types
from train.stream import Stream
from train.tokens import TokenSettings

BASELINE_CELLS = 16384
EVALUATION_STEPS = 20


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    steps: int
    loss_first: float
    loss_last: float
    loss_test: float
    loss_test_first: float
    cells_per_s: float
    data_wait_share: float
    parameters: int
    checkpoint: str
    resumed_from: int


def run_folder(settings: RunSettings) -> Path:
    """Return the folder of a run."""
    return Path(settings.output).absolute() / settings.name


def fingerprint(settings: RunSettings, snapshot_id: str) -> str:
    """Digest what a run must keep to be the same run: everything but its length, workers and where it stands."""
    free = {"steps", "workers", "output", "lake", "address", "threads", "checkpoint_every"}
    values = settings.model_dump(mode="json", exclude=free) | {"snapshot_id": snapshot_id}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def begun_otherwise(folder: Path, settings: RunSettings) -> ConflictError:
    """Return the error of a run whose folder holds a training state of other settings."""
    return ConflictError(
        f"{folder}: run {settings.name!r} was begun with other settings or another snapshot; choose another name, or "
        "remove the folder"
    )


class Run:
    """One run in one process of it."""

    def __init__(self, settings: RunSettings, world: int) -> None:
        """Open everything.

        Args:
            settings: The run's settings.
            world: Processes that there should be; Accelerate must see as many, or gradients would not be shared.
        """
        if not torch.cuda.is_available():
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.folder = run_folder(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=settings.precision,
            log_with="tensorboard",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # knowledge does not change
            project_dir=str(self.folder / "tensorboard"),
        )
        if self.accelerator.num_processes != world:
            raise VerificationError(
                f"Accelerate sees {self.accelerator.num_processes} processes and the launcher started {world}; "
                "gradients would not be shared"
            )
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, world
        self.snapshot: Snapshot = open_snapshot(settings.lake, settings.snapshot)
        self.labels: Labels = read_labels(self.snapshot, settings.data.split)
        data = settings.data
        controls = MatchedControls(share=data.matched_controls, earlier=data.earlier_cells)
        self.stream = self._stream(data.split, controls)
        self.vocabulary = _vocabulary(self.snapshot)
        self.fingerprint = fingerprint(settings, self.snapshot.id)
        torch.manual_seed(settings.seed)
        known = self._knowledge()
        days = settings.knowledge.days
        self.knowledge_files = {
            path: {"sha256": checkpoint.sha256(Path(path)), "day": days.get(path, "")}
            for path in settings.knowledge.files
        }
        types = self.labels.values["cell_type"]
        self.types = type_terms(types) if settings.model.types and len(types) > 2 else None
        self.plain = CellModel(self._config(known))
        if self.types is not None:
            tell_types(self.plain, self.types)
        self.plain.know(
            torch.from_numpy(known.feature_E),
            torch.from_numpy(known.set_E),
            {kind: torch.from_numpy(table) for kind, table in known.vectors.items()},
        )
        self.plain.identity.lie(
            *(torch.from_numpy(part) for part in (known.chromosome_F, known.base_F, known.bases_FW))
        )
        self._begin_at_the_floor()
        optimizer = torch.optim.AdamW(
            self.plain.parameters(), lr=settings.optim.lr, betas=(0.9, 0.98), weight_decay=settings.optim.weight_decay
        )
        self.step = self._resume(optimizer)
        self.resumed_from = self.step
        self.model, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        panels = {name: self.snapshot.presence(name)[1] for name in self.snapshot.measurements}
        tokens = TokenSettings(budget=settings.data.tokens, levels=self.plain.config.levels)
        covered = _coverage(self.snapshot, self.vocabulary)
        self.objective = Objective(panels, tokens, settings.seed, self.device, settings.data.queries, covered)

    def _stream(self, split: str, controls: MatchedControls | None = None) -> Stream:
        data = self.settings.data
        return Stream(
            self.snapshot,
            batch=data.global_batch,
            seed=self.settings.seed,
            split=split,
            block=data.block,
            window=data.window,
            lanes=data.lanes,
            controls=controls,
            sets=data.sets,
            memory_bytes=data.memory_mb * 2**20,
            cache=data.cache or None,
            cache_bytes=int(data.cache_gb * 2**30),
            labels=self.labels,
        )

    def _knowledge(self) -> Knowledge:
        """Read what is known of the features, and match it with them."""
        told = self.settings.knowledge
        names = [
            pair for part in self.vocabulary.values() for pair in zip(part.feature_id, part.feature_name, strict=True)
        ]
        genes = read_regions(told.positions) if told.positions else {}
        places = locate(names, genes)
        bases_FW = read_windows(names, places, told.genome, told.window) if told.genome else None
        sets = read_sets(told.sets, told.smallest, told.largest)
        if told.motifs and bases_FW is not None:
            sets |= motif_sets(names, bases_FW, read_motifs(told.motifs))
        aliases = neighbours(names, genes) | (read_aliases(told.aliases) if told.aliases else {})
        vectors = {kind: getattr(told, kind) for kind in ("sequence", "text") if getattr(told, kind)}
        known = gather_knowledge(
            names,
            sets,
            {kind: read_vectors(path) for kind, path in vectors.items()},
            aliases,
            self.settings.seed if told.permute else None,
        )
        return known.placed(places, bases_FW) if told.positions or told.genome else known

    def _config(self, known: Knowledge) -> ModelConfig:
        told = self.settings.model.model_dump(exclude={"types"})
        sizes: dict[str, Any] = {
            "n_sets": len(known.sets),
            "n_memberships": len(known.set_E),
            "frozen": {kind: table.shape[1] for kind, table in known.vectors.items()},
            "n_features": {name: len(part.feature_id) for name, part in self.vocabulary.items()},
            "n_prompts": {name: len(self.labels.values[name]) for name in PROMPTS},
            "n_perturbations": len(self.labels.values["perturbation"]),
            "n_terms": 0 if self.types is None else self.types.n_terms,
            "n_term_links": 0 if self.types is None else len(self.types.term_E),
            "niche": self.settings.data.sets,
            "n_chromosomes": len(known.chromosomes),
            "window": known.bases_FW.shape[1],
            "levels": tuple(name for name in self.vocabulary if name in self.snapshot.levels),
        }
        try:
            return ModelConfig(**sizes, **told)
        except ValueError as error:
            raise UsageError(f"model.{error}") from None

    def _begin_at_the_floor(self) -> None:
        """Let the model begin where the first training rows are."""
        source = max(self.stream.sources, key=lambda one: one.n_rows)
        rows = source.rows(np.array([0, min(source.n_rows, BASELINE_CELLS) - 1])) + source.part.first_row
        counts = {}
        for name, part in self.vocabulary.items():
            block = self.snapshot.block(name, int(rows[0]), int(rows[1]) + 1)
            shape = (len(block.indptr) - 1, len(part.feature_id))
            counts[name] = csr_matrix((block.counts.astype(np.float32), block.features, block.indptr), shape=shape)
        begin(self.plain, counts, seed=self.settings.seed)

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest valid state into model and optimizer; return the step to go on with."""
        known = checkpoint.valid_states(self.folder / "state")
        if not known:
            return 0
        _materialise(optimizer)
        state = {"model": self.plain.state_dict(), "optimizer": optimizer.state_dict()}
        manifest = checkpoint.load_state(self.folder / "state", state)
        if manifest is None:
            return 0
        if manifest["fingerprint"] != self.fingerprint:
            raise begun_otherwise(self.folder, self.settings)
        self.plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(manifest["global_step"])

    def save(self) -> None:
        """Save the training state; every rank calls it, the first one writes."""
        if self.rank == 0:
            optimizer = self.optimizer.optimizer if hasattr(self.optimizer, "optimizer") else self.optimizer
            state = {"model": self.plain.state_dict(), "optimizer": optimizer.state_dict()}
            values = {
                "global_step": self.step,
                "fingerprint": self.fingerprint,
                "seed": self.settings.seed,
                "world": self.world,
                "snapshot": self.provenance()["snapshot"],
            }
            checkpoint.save_state(self.folder / "state", state, values)
        self.accelerator.wait_for_everyone()

    def provenance(self) -> dict[str, Any]:
        """Return where the model comes from, for manifests."""
        snapshot = self.snapshot
        return {
            "snapshot": {
                "name": snapshot.name,
                "id": snapshot.id,
                "commit_id": snapshot.commit_id,
                "lake_timestamp": snapshot.lake_timestamp,
                "vocabulary_hash": snapshot.vocabulary_hash,
                "n_cells": snapshot.n_cells,
            },
            "global_step": self.step,
            "seed": self.settings.seed,
            "settings": self.settings.model_dump(mode="json"),
            "knowledge": self.knowledge_files,
            "measurements": list(self.vocabulary),
            "prompt_fields": list(PROMPTS),
        }

    # ------------------------------------------------------------------------------------------------------- steps
    def train(self) -> Summary:
        """Train to the last step, evaluate, export; return what came of it."""
        if self.rank == 0:
            _write_json(self.folder / "settings.json", self.settings.model_dump(mode="json"))
        self.accelerator.init_trackers("")
        if self.step == 0:
            before = self.evaluate()
            if self.rank == 0:
                _write_json(self.folder / "start.json", {"loss_test": before})
        first_step = self.step
        batches = self.stream.steps(self.step, self.settings.steps, rank=self.rank, world=self.world)
        with _Metrics(self.folder / "metrics.jsonl", self.rank, self.step) as metrics:
            for batch, waited in _timed(batches):
                row = self._one(batch) | {"data_wait_s": waited, "entropy_ratio": self.stream.telemetry.ratio}
                self.step += 1
                if self.rank == 0:
                    metrics.write({"step": self.step, "time": time.time(), **row})
                    self.accelerator.log({key: row[key] for key in ("loss", "lr", "grad_norm")}, step=self.step)
                if self.step % self.settings.checkpoint_every == 0 and self.step < self.settings.steps:
                    self.save()
        if self.step > first_step:
            self.save()
        test = self.evaluate()
        for tracker in self.accelerator.trackers:  # end_training() would also end the launcher's process group
            tracker.finish()
        if self.rank == 0:
            self._export(self._summary(test))
        self.accelerator.wait_for_everyone()
        return read_summary(self.folder)

    def _one(self, batch: Cells) -> dict[str, float]:
        """Take one step; the loss is that of all ranks together."""
        begin = time.monotonic()
        rate = learning_rate(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.accelerator.autocast():
            loss, n_tokens, n_cells = self.objective(self.model, self.plain, batch, self.step)
        sums = self._sum(loss.rebuilt.detach(), loss.pairs, n_cells, n_tokens, loss.asked.detach())
        mean = float(sums[0] / sums[1])
        if not math.isfinite(mean):
            raise VerificationError(
                f"step {self.step}: the loss is {mean}; rows {batch.row[:8].tolist()}... of snapshot "
                f"{self.snapshot.name!r}; lower optim.lr or look at these cells"
            )
        self.accelerator.backward(loss.total * self.world / sums[1])
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.optim.clip_norm)
        middle = time.monotonic()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.monotonic()
        return {
            "loss": mean,
            "loss_asked": float(sums[4] / sums[1]),
            "lr": rate,
            "grad_norm": float(norm),
            "cells": float(sums[2]),
            "tokens": float(sums[3]),
            "forward_backward_s": middle - begin,
            "optimizer_s": end - middle,
        }

    def _sum(self, *values: Any) -> torch.Tensor:
        """Add up values over all ranks."""
        sums = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def evaluate(self) -> float:
        """Return the mean loss on the test split, over at most ``EVALUATION_STEPS`` batches; NaN when there is none."""
        split = self.settings.data.test_split
        if not self.snapshot.manifest["splits"].get(split):
            return math.nan
        stream = self._stream(split)
        steps = min(stream.plan.steps_per_epoch, EVALUATION_STEPS)
        total = torch.zeros(2, dtype=torch.float64)
        self.plain.eval()
        with torch.no_grad():
            for batch in stream.steps(0, steps, rank=self.rank, world=self.world):
                loss, *_ = self.objective(self.plain, self.plain, batch, None)
                total += torch.tensor([float(loss.rebuilt), float(loss.pairs)], dtype=torch.float64)
        self.plain.train()
        sums = self._sum(*total)
        return float(sums[0] / sums[1])

    def _summary(self, test: float) -> Summary:
        """Sum up the whole run, also the part before a resume, from its metrics."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        last = rows[-20:]
        seconds = sum(row["data_wait_s"] + row["forward_backward_s"] + row["optimizer_s"] for row in rows)
        return Summary(
            steps=self.step,
            loss_first=rows[0]["loss"],
            loss_last=sum(row["loss"] for row in last) / len(last),
            loss_test=test,
            loss_test_first=_number(json.loads((self.folder / "start.json").read_text(encoding="utf-8"))["loss_test"]),
            cells_per_s=sum(row["cells"] for row in rows) / seconds,
            data_wait_share=sum(row["data_wait_s"] for row in rows) / seconds,
            parameters=sum(part.numel() for part in self.plain.parameters()),
            checkpoint=str(self.folder / "checkpoint"),
            resumed_from=self.resumed_from,
        )

    def _export(self, summary: Summary) -> None:
        figures = {key: value for key, value in asdict(summary).items() if key != "checkpoint"}
        _write_json(self.folder / "summary.json", figures)
        provenance = self.provenance() | {"figures": figures}
        checkpoint.export(
            self.folder / "checkpoint",
            self.plain,
            self.objective.settings,
            self.vocabulary,
            {name: self.labels.values[name] for name in (*PROMPTS, "perturbation")},
            provenance | {"figures": checkpoint.json_values(figures)},
            write_card(self.snapshot, self.settings, provenance),
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a run's metrics, one dictionary for each finished step; a last line that was cut off is not there."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_summary(folder: Path) -> Summary:
    """Read what a finished run came to."""
    values = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    losses = {name: _number(values[name]) for name in ("loss_test", "loss_test_first")}
    return Summary(**(values | losses), checkpoint=str(folder / "checkpoint"))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def learning_rate(settings: RunSettings, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to a tenth of the peak."""
    peak, warm = settings.optim.lr, settings.optim.warmup_steps
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, settings.steps - warm)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer that never stepped the state that a saved one has, so that it can be loaded in place."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _vocabulary(snapshot: Snapshot) -> dict[str, Vocabulary]:
    tables = {name: snapshot.vocabulary(name) for name in snapshot.measurements if name not in COVERAGE.values()}
    columns = ("feature_id", "feature_name", "organism")
    return {name: Vocabulary(*(table[column].to_pylist() for column in columns)) for name, table in tables.items()}


def _coverage(snapshot: Snapshot, vocabulary: dict[str, Vocabulary]) -> dict[str, NDArray[np.int64]]:
    """Return where the coverage of each feature of a measurement of fractions stands; -1 where it stands nowhere."""
    found = {}
    for name, coverage in COVERAGE.items():
        if name in vocabulary and coverage in snapshot.measurements:
            place = {one: number for number, one in enumerate(snapshot.vocabulary(coverage)["feature_id"].to_pylist())}
            found[name] = np.array([place.get(one, -1) for one in vocabulary[name].feature_id], np.int64)
    return found


def _timed(batches: Iterator[Cells]) -> Iterator[tuple[Cells, float]]:
    """Yield each batch with the seconds that were waited for it."""
    while True:
        begin = time.monotonic()
        try:
            cells = next(batches)
        except StopIteration:
            return
        yield cells, time.monotonic() - begin


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(checkpoint.json_values(values), indent=1, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)


class _Metrics:
    """One JSON line for each step; lines after the step that a run resumes from are dropped, they come again."""

    def __init__(self, path: Path, rank: int, step: int) -> None:
        self.path = path
        self.rank = rank
        self.step = step

    def __enter__(self) -> _Metrics:
        if self.rank == 0:
            rows = read_metrics(self.path) if self.path.exists() else []
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.step]
            self.path.write_text("".join(kept), encoding="utf-8")
            self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if self.rank == 0:
            self.file.close()

    def write(self, row: dict[str, float]) -> None:
        """Append a row."""
        self.file.write(json.dumps(checkpoint.json_values(row), allow_nan=False) + "\n")
        self.file.flush()
