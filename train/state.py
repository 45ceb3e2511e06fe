"""This module keeps the state that training goes on from: sharded, written while training goes on, whole or not at all.

Every rank writes its part of weights and moments (torch's distributed checkpoint), so that any number of ranks can go
on from it. A thread writes a copy while the next steps are taken; one save is under way at a time. The manifest comes
last: a directory without a valid one does not exist.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from store.errors import InputRefused
from store.lake import utc_now
from train.checkpoint import MANIFEST, read_manifest, write_manifest
from train.folder import valid_states


class States:
    """The training states of a run, in ``folder/step_<global_step>_<random>``.

    Attributes:
        committed: Step of the newest state that is whole, as the first rank knows; 0 before there is one.
    """

    def __init__(
        self, folder: Path, *, rank: int = 0, world: int = 1, keep_last: int = 2, keep_best: bool = False
    ) -> None:
        """Say where; every rank makes one, with the process group there already.

        Args:
            folder: The folder of states, seen by all ranks.
            rank: This process.
            world: All processes.
            keep_last: States that are kept.
            keep_best: Keep that with the lowest ``loss_test`` too.
        """
        self.folder, self.rank, self.keep_last, self.keep_best = folder, rank, keep_last, keep_best
        self.group = dist.new_group(backend="gloo") if world > 1 else None  # the thread has a group of its own
        self.attempt = str(self._agreed(secrets.token_hex(4)))
        gpu = torch.cuda.is_available()
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
            )
        )
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.saved = -1
        self.committed = 0

    def load(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        check: Callable[[dict[str, Any]], object] = lambda manifest: None,
    ) -> dict[str, Any] | None:
        """Load the newest valid state, saved by any number of ranks; return its manifest, or None if there is none.

        Damaged ones that are newer are set aside, as ``damaged_step_...``: they would count as the newest for ever.

        Args:
            model: As it is wrapped.
            optimizer: Unwrapped.
            check: Called with the manifest before anything is loaded; raises what stands against it.
        """
        found = self._agreed(self._newest() if self.rank == 0 else None)
        if found is None:
            return None
        path, manifest = found
        check(manifest)
        self._read(path, model, optimizer)
        self.saved = self.committed = int(manifest["global_step"])
        return dict(manifest)

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        found = newest(self.folder)
        for path in valid_states(self.folder):
            if found is None or path > found[0]:
                _set_aside(path)
        return found

    def _read(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weights, moments = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        with one_process():
            dcp_load(state, checkpoint_id=path, process_group=self.group, no_dist=self.group is None)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def load_best(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the valid state with the lowest held-out loss; return its manifest, or None if none has one.

        Damaged ones whose loss is lower are set aside.
        """
        found = self._agreed(self._whole_best() if self.rank == 0 else None)
        if found is None:
            return None
        path, manifest = found
        self._read(path, model, optimizer)
        return dict(manifest)

    def _whole_best(self) -> tuple[Path, dict[str, Any]] | None:
        while (path := _best(valid_states(self.folder))) is not None:
            try:
                return path, read_manifest(path)
            except InputRefused:
                _set_aside(path)
        return None

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, values: dict[str, Any]) -> None:
        """Copy the state and begin to write it; every rank calls this. It waits for the save before.

        Args:
            model: As it is wrapped.
            optimizer: Unwrapped.
            values: What the manifest says; holds ``global_step``.

        Raises:
            BaseException: What stopped the save before.
        """
        self.finish()
        if self.saved == values["global_step"]:
            return
        weights, moments = get_state_dict(model, optimizer)
        state = self.stager.stage({"model": weights, "optimizer": moments})
        self.saved = values["global_step"]
        self.thread = threading.Thread(target=self._write, args=(state, values), name="save state", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Wait until the save under way is whole.

        Raises:
            BaseException: What stopped it.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def settle(self, timeout_s: float = 60.0) -> None:
        """Let the save under way become whole before this process ends of an error; other ranks may be gone."""
        if self.thread is not None:
            self.thread.join(timeout_s)

    def _write(self, state: dict[str, Any], values: dict[str, Any]) -> None:
        try:
            target = self.folder / f"step_{values['global_step']:09d}_{self.attempt}"
            target.mkdir(parents=True, exist_ok=True)
            with one_process():
                dcp_save(state, checkpoint_id=target, process_group=self.group, no_dist=self.group is None)
            if self.rank == 0:  # it returns here only when every rank has written
                write_manifest(target, {**values, "created": utc_now()})
                self.committed = int(values["global_step"])
                self._forget(target)
        except BaseException as error:  # noqa: BLE001  (told to whoever waits)
            self.error = error

    def _forget(self, written: Path) -> None:
        """Remove states that are not kept, the manifest first, and what earlier attempts left half-written.

        Args:
            written: The state that was just written, which is kept in any case.
        """
        states = valid_states(self.folder)
        kept = [*states[-self.keep_last :], written]
        best = _best(states) if self.keep_best else None
        for old in states:
            if old not in kept and old != best:
                (old / MANIFEST).unlink()
                shutil.rmtree(old, ignore_errors=True)
        for left in self.folder.glob("step_*"):
            if not left.name.endswith(f"_{self.attempt}") and not (left / MANIFEST).exists():
                shutil.rmtree(left, ignore_errors=True)

    def _agreed(self, value: Any) -> Any:
        """Return what the first rank says."""
        if self.group is None:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.group)
        return said[0]


@contextmanager
def one_process() -> Iterator[None]:
    """Keep torch from warning that one process saves or loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest state all of whose files are what its manifest says, and the manifest."""
    for path in reversed(valid_states(folder)):
        try:
            return path, read_manifest(path)
        except InputRefused:
            continue
    return None


def _best(states: list[Path]) -> Path | None:
    """Return the state with the lowest held-out loss, the newest of equals; the bytes beside manifests are not read."""
    said = {path: _held_out(path) for path in states}
    losses = {path: loss for path, loss in said.items() if loss is not None}
    return min(reversed(losses), key=lambda path: losses[path]) if losses else None


def _held_out(state: Path) -> float | None:
    """Return a state's held-out loss; None where it has none, or a manifest that is damaged."""
    try:
        loss = json.loads((state / MANIFEST).read_text(encoding="utf-8")).get("loss_test")
        return None if loss is None else float(loss)
    except (AttributeError, TypeError, ValueError):
        return None


def _set_aside(state: Path) -> None:
    """Let a damaged state be none; it stays to be looked at."""
    state.rename(state.with_name(f"damaged_{state.name}"))
