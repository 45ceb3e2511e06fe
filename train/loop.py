"""This module is the training loop: Accelerate around a model, a stream in, metrics and checkpoints out.

It knows nothing of Ray: it runs in one process, under torchrun, and under Ray Train, which give it the process group.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from store.errors import InputRefused, InterruptedRun, UsageError, VerificationError
from store.snapshot import Snapshot, open_snapshot
from train import checkpoint
from train.adapter import AdapterSettings, save_adapter
from train.arithmetic import operations, peak_of
from train.assembly import coverage_of, parts_of
from train.beginning import first_values, measured_values
from train.blocks import Block
from train.card import describe, write_card
from train.cells import PROMPTS, Cells, with_absent, with_known
from train.checkpoint import Checkpoint
from train.controls import MatchedControls
from train.ending import Ending
from train.folder import begun_otherwise, exported, fingerprint, knowledge_hashes, refuse_shorter, run_folder
from train.labels import Labels, read_labels
from train.model import CellModel
from train.novelty import HELD_OUT_CELLS, REFERENCE_CELLS, Reference, first_cells, make_reference
from train.objective import Objective
from train.predictor import Predictor
from train.record import PARTS, Metrics, Summary, kept_metrics, number_or_nan, read_summary, write_json
from train.schedule import learning_rate
from train.settings import RunSettings
from train.sources import refuse_empty_splits
from train.start import begin
from train.state import States
from train.stream import Stream

EVALUATION_STEPS = 20
WARNED_EVERY = 10
Observer = Callable[[dict[str, float]], object]
"""Told of a step's figures."""


def unobserved(row: dict[str, float]) -> None:
    """Tell nobody."""


def never() -> bool:
    """Warn of nothing."""
    return False


class Run:
    """One run in one process of it."""

    def __init__(self, settings: RunSettings, world: int) -> None:
        """Open everything.

        Args:
            settings: The run's settings.
            world: Processes that there should be; Accelerate must see as many, or gradients would not be shared.
        """
        on_gpu = settings.device != "cpu" and torch.cuda.is_available()
        if settings.device == "cuda" and not on_gpu:
            raise UsageError("device = 'cuda': torch sees no GPU in this worker")
        if not on_gpu:
            torch.set_num_threads(settings.threads)
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        _check_trackers(settings.trackers)
        self.settings = settings
        self.folder = run_folder(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="bf16" if settings.precision == "fp8" else settings.precision,
            log_with=list(settings.trackers) or None,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # knowledge does not change
            project_dir=str(self.folder / "tensorboard"),
        )
        if self.accelerator.num_processes != world:
            raise VerificationError(
                f"Accelerate sees {self.accelerator.num_processes} processes and the launcher started {world}; "
                "gradients would not be shared"
            )
        if settings.precision == "fp16" and self.accelerator.scaler is None:
            raise UsageError("precision = 'fp16' needs a GPU, and torch sees none in this worker; take 'bf16' or 'no'")
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, world
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.peak = peak_of(device, half=settings.precision != "no")
        self.snapshot: Snapshot = open_snapshot(settings.lake, settings.snapshot)
        refuse_empty_splits(settings, self.snapshot)
        self.base = checkpoint.load(settings.adapter.base) if settings.adapter.base else None
        words = None if self.base is None else self.base.prompts
        self.labels: Labels = read_labels(self.snapshot, settings.data.split, words)
        data = settings.data
        controls = MatchedControls(share=data.matched_controls, earlier=data.earlier_cells)
        self.stream = self._stream(data.split, controls)
        known, days = knowledge_hashes(settings), settings.knowledge.days
        self.fingerprint = fingerprint(settings, self.snapshot.id, known)
        self.knowledge_files = {path: {"sha256": digest, "day": days.get(path, "")} for path, digest in known.items()}
        torch.manual_seed(settings.seed)
        parts = parts_of(settings, self.snapshot, self.labels, self.base)
        self.vocabulary, self.plain, tokens = parts.vocabulary, parts.build(), parts.tokens(settings)
        if self.base is None:
            self._begin_at_the_floor()
        self.plain.recompute = settings.recompute
        if settings.precision == "fp8":
            _in_float8(self.plain, self.device)
        if settings.compile:
            _compile(self.plain)
        self.parameters = sum(part.numel() for part in self.plain.parameters())
        self.model = self._spread()
        learns = [weight for weight in self.plain.parameters() if weight.requires_grad]
        told = settings.optim
        optimizer = torch.optim.AdamW(learns, lr=told.lr, betas=(0.9, 0.98), weight_decay=told.weight_decay, fused=True)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.states = States(
            self.folder / "state",
            rank=self.rank,
            world=world,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
        )
        self.loss_test, self.blocked_s = math.nan, 0.0
        self.ending: Ending | None = None
        self.ends = False
        self.cache_read = (0, 0)
        self.step = self._resume()
        self.resumed_from = self.step
        panels = {name: self.snapshot.presence(name)[1] for name in self.snapshot.measurements}
        n_datasets = len(next(iter(panels.values())))
        self.absent = {
            name: size for name, size in self.plain.config.n_features.items() if name not in self.snapshot.measurements
        }
        panels |= {name: np.zeros((n_datasets, size), dtype=bool) for name, size in self.absent.items()}
        sizes = self.plain.config.n_features
        self.known = {name: size for name, size in sizes.items() if panels[name].shape[1] > size}
        panels |= {name: panels[name][:, :size] for name, size in self.known.items()}
        covered = coverage_of(self.snapshot, self.vocabulary)
        self.objective = Objective(panels, tokens, settings.seed, self.device, settings.data.queries, covered)

    def _spread(self) -> torch.nn.Module:
        """Return the model as the ranks share it: a copy on each, or a part of it on each.

        FSDP2 is torch's own and not Accelerate's plug-in, which becomes data parallel on CPU without a word: so what is
        tested on CPU is what runs on GPUs. Weights are gathered in single precision; autocast does the arithmetic.
        """
        if self.settings.parallel == "ddp" or self.world == 1:
            wrapped: torch.nn.Module = self.accelerator.prepare(self.plain)
            return wrapped
        self.plain.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in (*self.plain.blocks, *self.plain.query_blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(self.plain, mesh=mesh)
        return self.plain

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

    def _begin_at_the_floor(self) -> None:
        """Let the model begin where the first training rows are; levels are measured by rows of all sources."""
        sizes = {name: len(part.feature_id) for name, part in self.vocabulary.items()}
        levels = {name: measured_values(self.stream.sources, name, sizes[name]) for name in self.plain.config.levels}
        values = first_values(self.stream.sources, sizes)
        begin(self.plain, values, levels, seed=self.settings.seed)

    # ----------------------------------------------------------------------------------------------------- states
    def _resume(self) -> int:
        """Load the newest valid state; return the step to go on with."""
        manifest = self.states.load(self.model, self._bare, self._refuse_others)
        if manifest is None:
            return 0
        if self.accelerator.scaler is not None and manifest.get("scaler"):
            self.accelerator.scaler.load_state_dict(manifest["scaler"])
        return int(manifest["global_step"])

    def _refuse_others(self, manifest: dict[str, Any]) -> None:
        """Refuse a state of other settings, or of a later step than the last."""
        if manifest["fingerprint"] != self.fingerprint:
            raise begun_otherwise(self.folder, self.settings)
        refuse_shorter(self.folder, self.settings, int(manifest["global_step"]))

    @property
    def _bare(self) -> torch.optim.Optimizer:
        """The optimizer without Accelerate's wrapper."""
        found: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return found

    def save(self) -> None:
        """Begin to save the training state; every rank calls it. Training goes on while it is written."""
        begin = time.monotonic()
        scaler = self.accelerator.scaler  # of fp16; it is the same on every rank, whose gradients are
        values = {
            "global_step": self.step,
            "fingerprint": self.fingerprint,
            "seed": self.settings.seed,
            "world": self.world,
            "snapshot": self.provenance()["snapshot"],
            "loss_test": self.loss_test if math.isfinite(self.loss_test) else None,
            "scaler": None if scaler is None else scaler.state_dict(),
            "versions": checkpoint.versions(),
        }
        self.states.save(self.model, self._bare, values)
        self.blocked_s += time.monotonic() - begin

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
    def train(
        self, each: Observer = unobserved, warned: Callable[[], bool] = never, ending: Ending | None = None
    ) -> Summary:
        """Train to the last step, evaluate, export; return what came of it.

        Args:
            each: Told of every step's figures, on every rank.
            warned: Says that this process will be taken away; asked every ``WARNED_EVERY`` steps, by all ranks at the
                same step. The state is saved at once then, once for each warning.
            ending: Where the run is asked to end; the first rank listens, and all save and end after the same step.

        Raises:
            InterruptedRun: It was asked to end, and its state is saved.
        """
        settings = self.settings
        if self.rank == 0:
            write_json(self.folder / "settings.json", settings.model_dump(mode="json"))
        self.accelerator.init_trackers(settings.name)
        if self.step == 0:
            at_start = self.evaluate()
            if self.rank == 0:
                write_json(self.folder / "start.json", {"loss_test": at_start})
        first_step = self.step
        self.ending = ending if self.rank == 0 else None
        with self.ending.listening() if self.ending else nullcontext():
            with Metrics(self.folder / "metrics.jsonl", self.rank, self.step) as metrics:
                try:
                    self._steps(metrics, each, warned)
                except BaseException:
                    self.states.settle()
                    raise
            if self.step > first_step:
                self.save()
            self.states.finish()
        if self.ends:
            raise InterruptedRun(f"{self.folder}: asked to end after step {self.step:,}, with its state saved")
        self.loss_test = self.evaluate()
        for tracker in self.accelerator.trackers:  # end_training() would also end the launcher's process group
            tracker.finish()
        self._export(self.loss_test)
        if self.rank == 0 and settings.report:
            from train.report import write_report  # draws; not needed before

            write_report(self.folder)
        self.accelerator.wait_for_everyone()
        return read_summary(self.folder)

    def _steps(self, metrics: Metrics, each: Observer, warned: Callable[[], bool]) -> None:
        """Take the steps that are left, or those until the run is asked to end."""
        settings, leaving = self.settings, False
        batches = self.stream.steps(self.step, settings.steps, rank=self.rank, world=self.world)
        for batch, waited in _timed(batches):
            blocked, self.blocked_s = self.blocked_s, 0.0
            row = self._one(self._of_the_model(batch)) | {"data_wait_s": waited, "checkpoint_s": blocked}
            row |= self._cache_blocks()
            row["entropy_ratio"] = self.stream.telemetry.ratio
            row["checkpoint_step"] = self.states.committed
            if self.peak is not None:
                row["mfu"] = row["operations"] / (self.peak * self.world * sum(row[key] for key in PARTS))
            self.step += 1
            self.loss_test = math.nan  # of this step's weights, or of none
            if evaluated := bool(settings.evaluate_every and self.step % settings.evaluate_every == 0):
                row["loss_test"] = self.loss_test = self.evaluate()
            row = {"step": self.step, "time": time.time(), **row}
            each(row)
            if self.rank == 0:
                metrics.write(row)
                shown = ("loss", "loss_test", "lr", "grad_norm")
                self.accelerator.log({key: row[key] for key in shown if key in row}, step=self.step)
            urgent = False
            if self.step % WARNED_EVERY == 0:
                before, leaving = leaving, warned()
                urgent = leaving and not before
            due = self.step % settings.checkpoint_every == 0 or (settings.keep_best and evaluated)
            if urgent or (due and self.step < settings.steps):
                self.save()
            if urgent:
                self.states.finish()
            if self.ends:
                return

    def _of_the_model(self, cells: Cells) -> Cells:
        """Return cells with the measurements and features that the model has."""
        return with_absent(with_known(cells, self.known), self.absent)

    def _cache_blocks(self) -> dict[str, float]:
        """Return the blocks since the step before that this rank's cache had and had not; nothing without a cache."""
        cache = self.stream.cache
        if cache is None:
            return {}
        before, self.cache_read = self.cache_read, (cache.hits, cache.misses)
        return {"cache_hits": self.cache_read[0] - before[0], "cache_misses": self.cache_read[1] - before[1]}

    def _one(self, cells: Cells) -> dict[str, float]:
        """Take one step, in as many parts as settings ask for; the loss is that of all parts and ranks together."""
        begin = time.monotonic()
        rate = learning_rate(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        guess = float(self.settings.data.global_batch)  # of pairs, so that small gradients do not vanish on the way
        totals, moved_s = torch.zeros(7, dtype=torch.float64, device=self.device), 0.0
        parts = split(cells, n_parts(self.settings.data.micro_batch, self.settings.data.global_batch, self.world))
        for number, part in enumerate(parts):
            start = time.monotonic()
            batch = self.objective.prepare(self.plain, part, self.step)
            moved_s += time.monotonic() - start
            with self._shared(number == len(parts) - 1), self.accelerator.autocast():
                loss = self.objective.loss(self.model, self.plain, batch)
                self.accelerator.backward(loss.total / guess)
            done = operations(self.plain, batch.seen)
            totals += self._together(loss.rebuilt, loss.pairs, part.n_cells, batch.seen.tokens, loss.asked, done, 0.0)
        totals[-1] = self.ending is not None and self.ending.heard()
        rebuilt, pairs, n_cells, n_tokens, asked, done, ends = self._sum(totals)
        self.ends = ends > 0  # of all ranks after the same step
        mean = rebuilt / pairs if pairs else math.nan
        these = f"rows {cells.row[:8].tolist()}... of snapshot {self.snapshot.name!r}; lower optim.lr or look at them"
        if not math.isfinite(mean):
            raise VerificationError(f"step {self.step}: the loss is {mean}; {these}")
        gradients = [weight.grad for weight in self.plain.parameters() if weight.grad is not None]
        torch._foreach_mul_(gradients, guess * self.world / pairs)  # ranks were averaged
        norm = _plain(self.accelerator.clip_grad_norm_(self.plain.parameters(), self.settings.optim.clip_norm))
        if not math.isfinite(norm) and self.settings.precision != "fp16":  # there the scaler leaves the step out
            bad = [name for name, one in self.plain.named_parameters() if not _finite(one.grad)]
            where = bad[0] if bad else "a weight of another rank"
            raise VerificationError(f"step {self.step}: the norm of the gradient is {norm}, by {where}; {these}")
        middle = time.monotonic()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.monotonic()
        return {
            "loss": mean,
            "loss_asked": asked / pairs,
            "lr": rate,
            "grad_norm": norm,
            "cells": n_cells,
            "tokens": n_tokens,
            "operations": done,
            "h2d_s": moved_s,
            "forward_backward_s": middle - begin - moved_s,
            "optimizer_s": end - middle,
        }

    @contextmanager
    def _shared(self, last: bool) -> Iterator[None]:
        """Let ranks add up their gradients with the last part of a step only."""
        if self.world == 1:
            yield
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def _together(self, *values: Any) -> torch.Tensor:
        """Return numbers of the host and of the device in one tensor of it, float64, without waiting for it."""
        here = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        return torch.stack(here).detach()

    def _sum(self, totals: torch.Tensor) -> list[float]:
        """Add up numbers over all ranks and wait for them."""
        if self.world > 1:
            dist.all_reduce(totals)
        found: list[float] = totals.tolist()
        return found

    def evaluate(self) -> float:
        """Return the mean loss on the test split, over at most ``EVALUATION_STEPS`` batches; NaN when there is none."""
        split = self.settings.data.test_split
        if not self.snapshot.manifest["splits"].get(split):
            return math.nan
        stream = self._stream(split)
        steps = min(stream.plan.steps_per_epoch, EVALUATION_STEPS)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.plain.eval()
        with torch.no_grad():
            for batch in stream.steps(0, steps, rank=self.rank, world=self.world):
                loss, *_ = self.objective(self.plain, self.plain, self._of_the_model(batch), None)
                total += self._together(loss.rebuilt, loss.pairs)
        self.plain.train()
        rebuilt, pairs = self._sum(total)
        return rebuilt / pairs if pairs else math.nan

    def _loss_at_start(self) -> float:
        """Return the loss on the test split before the first step; NaN where nothing says it."""
        path = self.folder / "start.json"
        try:
            return number_or_nan(json.loads(path.read_text(encoding="utf-8"))["loss_test"])
        except FileNotFoundError:
            return math.nan
        except (KeyError, TypeError, ValueError) as error:
            raise InputRefused(f"{path}: damaged: {error}; remove it, it holds a figure of the report alone") from None

    def _summary(self, test: float, step: int) -> Summary:
        """Sum up the run up to a step, also the part before a resume; what its metrics lost is no number."""
        first, last = math.nan, deque[float](maxlen=20)
        seconds = cells = waited = 0.0
        for row in kept_metrics(self.folder / "metrics.jsonl", step):
            first = first if last else row["loss"]
            last.append(row["loss"])
            seconds += sum(row.get(part, 0.0) for part in PARTS)
            cells, waited = cells + row["cells"], waited + row["data_wait_s"]
        return Summary(
            steps=step,
            loss_first=first,
            loss_last=sum(last) / len(last) if last else math.nan,
            loss_test=test,
            loss_test_first=self._loss_at_start(),
            cells_per_s=cells / seconds if seconds else math.nan,
            data_wait_share=waited / seconds if seconds else math.nan,
            parameters=self.parameters,
            checkpoint=str(self.folder / exported(self.settings)),
            resumed_from=self.resumed_from,
        )

    def _export(self, test: float) -> None:
        """Write what is served, and the summary when all is there.

        Every rank calls this, and where the model is in parts each gives its own.
        """
        name = exported(self.settings)
        self._export_as(name, test, self.step)
        if self.settings.keep_best:
            manifest = self.states.load_best(self.model, self._bare)
            if manifest is not None:
                chosen = {"split": self.settings.data.test_split, "of": self.step // self.settings.evaluate_every}
                lowest, step = float(manifest["loss_test"]), int(manifest["global_step"])
                self._export_as(f"{name}-best", lowest, step, chosen)
        if self.rank == 0:
            write_json(self.folder / "summary.json", self._figures(test, self.step))

    def _export_adapter(self, name: str, base: Checkpoint, about: dict[str, Any]) -> None:
        """Write the adapter alone."""
        if self.rank > 0:
            return
        sizes = AdapterSettings(self.settings.adapter.rank, self.settings.adapter.alpha)
        save_adapter(self.folder / name, self.plain, sizes, base.manifest, about=about)

    def _figures(self, test: float, step: int) -> dict[str, Any]:
        """Return what the run came to at a step, but where it lies."""
        return {key: value for key, value in asdict(self._summary(test, step)).items() if key != "checkpoint"}

    def _export_as(self, name: str, test: float, step: int, chosen: dict[str, Any] | None = None) -> None:
        """Write the weights as they are.

        Args:
            name: The folder.
            test: The loss that they have.
            step: The step that they are of.
            chosen: By which split they were chosen, and of how many; None of a run's last ones.
        """
        provenance = self.provenance() | {"global_step": step} | ({"chosen": chosen} if chosen else {})
        if self.rank == 0:
            figures = self._figures(test, step)
            provenance["figures"] = checkpoint.json_values(figures)
        if self.base is not None:
            self._export_adapter(name, self.base, provenance)
            return
        weights = get_model_state_dict(
            self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=isinstance(self.model, FSDPModule))
        )
        if self.rank > 0:
            return
        model = CellModel(self.plain.config)
        model.load_state_dict(weights)
        words = {name: self.labels.values[name] for name in (*PROMPTS, "perturbation")}
        provenance["data"] = describe(self.snapshot, self.settings.data.split)
        checkpoint.export(
            self.folder / name,
            model,
            self.objective.settings,
            self.vocabulary,
            words,
            provenance,
            write_card(self.snapshot, self.settings, provenance | {"figures": figures}),
            self._reference(Checkpoint(model.eval(), self.objective.settings, self.vocabulary, words, {})),
        )

    def _reference(self, trained: Checkpoint) -> Reference | None:
        """Embed cells that the model learned from, and others, so that novel cells can be told; None without others."""
        data, model = self.settings.data, Predictor(trained, str(self.device))
        model.model.to(self.device)
        embedded = []
        for split, n_cells in ((data.split, REFERENCE_CELLS), (data.test_split, HELD_OUT_CELLS)):
            if not self.snapshot.manifest["splits"].get(split):
                return None
            stream = self._stream(split)
            batches = stream.steps(0, stream.plan.steps_per_epoch)
            embedded.append(np.concatenate([model.embed(cells) for cells in first_cells(batches, n_cells)]))
        return make_reference(*(torch.from_numpy(part) for part in embedded))


def n_parts(micro_batch: int, global_batch: int, world: int) -> int:
    """Return the parts of a step, the same on every rank: a rank's largest share over what it takes at once."""
    share = math.ceil(global_batch / world)
    return 1 if micro_batch == 0 else math.ceil(share / micro_batch)


def split(cells: Cells, n: int) -> list[Cells]:
    """Cut a share into ``n`` parts of consecutive cells, as even as can be; sets stay whole, a part may be empty."""
    if n == 1:
        return [cells]
    rows = np.arange(cells.n_cells)
    if cells.set_C is None:
        return [cells.take(part) for part in np.array_split(rows, n)]
    dealt = np.array_split(np.unique(cells.set_C), n)
    return [cells.take(rows[np.isin(cells.set_C, part)]) for part in dealt]


def _plain(norm: Any) -> float:
    """Return a norm as a number, gathered where it lies in parts."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _finite(gradient: torch.Tensor | None) -> bool:
    if gradient is None:
        return True
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(torch.isfinite(own).all())


def _timed(batches: Iterator[Cells]) -> Iterator[tuple[Cells, float]]:
    """Yield each batch with the seconds that were waited for it."""
    while True:
        begin = time.monotonic()
        try:
            cells = next(batches)
        except StopIteration:
            return
        yield cells, time.monotonic() - begin


def _in_float8(model: CellModel, device: torch.device) -> None:
    """Let blocks multiply in 8 bits, which needs one more library."""
    try:
        from train.float8 import in_float8
    except ImportError as error:
        raise UsageError(
            "precision = 'fp8' needs torchao, which make setup brings: pip install '.[fp8]' in the checkout, or take "
            "precision = 'bf16'"
        ) from error
    in_float8(model, device)


def _compile(model: CellModel) -> None:
    """Compile the blocks, which is what takes the time; refuse at the start what would fail at the first step."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes long to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError("compile = true needs a C++ compiler (g++ or clang++) on every machine") from error
    for block in (part for part in model.modules() if isinstance(part, Block)):
        block.compile_dense()


def _check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that are not there: Accelerate would leave them out without a word."""
    there = {str(one.value if hasattr(one, "value") else one) for one in get_available_trackers()}
    for name in names:
        if name not in there:
            raise UsageError(
                f"trackers: {name!r} cannot be used here: there are {', '.join(sorted(there))}; install its package "
                "or leave it out"
            )
