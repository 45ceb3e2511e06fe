"""This module is a run's folder: where it lies, what it must keep to be the same run's, and what is finished in it.

Who launches a run needs no more of it, and does not wait for the loop's imports.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from store.errors import ConflictError, MissingError
from train import checkpoint
from train.checkpoint import MANIFEST
from train.settings import RunSettings

RUNS = ("steps", "workers", "workers_min", "max_failures", "output", "lake", "address", "device", "threads")
MEANS = ("parallel", "recompute", "compile", "collective_timeout_s", "patience_s")
KEPT = ("checkpoint_every", "keep_last", "keep_best", "evaluate_every", "trackers", "report")
FREE: dict[str, Any] = dict.fromkeys((*RUNS, *MEANS, *KEPT), True) | {
    "data": {"micro_batch": True, "memory_mb": True, "cache": True, "cache_gb": True},
    "adapter": {"base": True},
}
"""What may change between two starts of the same run."""


def run_folder(settings: RunSettings) -> Path:
    """Return the folder of a run."""
    return Path(settings.output).absolute() / settings.name


def knowledge_hashes(settings: RunSettings) -> dict[str, str]:
    """Return the SHA-256 of each file of knowledge.

    Raises:
        MissingError: One is not there.
    """
    for path in settings.knowledge.files:
        if not Path(path).is_file():
            raise MissingError(f"knowledge: {path}: no such file; paths count from where the command is started")
    return {path: checkpoint.sha256(Path(path)) for path in settings.knowledge.files}


def fingerprint(settings: RunSettings, snapshot_id: str, known: dict[str, str]) -> str:
    """Digest what a run must keep to be the same run: everything but its length, workers, and where and how it runs.

    Args:
        settings: The run's.
        snapshot_id: Of its cells.
        known: Its files of knowledge, as :func:`knowledge_hashes` returns them.
    """
    values = settings.model_dump(mode="json", exclude=FREE) | {"snapshot_id": snapshot_id}
    if known:
        values["knowledge_sha256"] = known
    if settings.adapter.base:
        values["base_sha256"] = checkpoint.read_manifest(settings.adapter.base)["model_sha256"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def exported(settings: RunSettings) -> str:
    """Return the name of the folder that a run leaves its result in."""
    return "adapter" if settings.adapter.base else "checkpoint"


def begun_otherwise(folder: Path, settings: RunSettings) -> ConflictError:
    """Return the error of a run whose folder holds a training state of other settings, naming some of them."""
    try:
        before = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    now, then = _flat(settings.model_dump(mode="json", exclude=FREE)), _flat(before)
    others = [f"{key} = {value!r}, it was {then[key]!r}" for key, value in now.items() if then.get(key, value) != value]
    files = ", ".join(settings.knowledge.files)
    told = ", ".join(others[:3]) or (
        f"a snapshot of that name which is another one, {f'{files} with other contents, ' if files else ''}or settings "
        "of another version"
    )
    return ConflictError(
        f"{folder}: run {settings.name!r} was begun with other settings ({told}); choose another name, or remove the "
        "folder"
    )


def refuse_shorter(folder: Path, settings: RunSettings, reached: int) -> None:
    """Refuse to go on with a run that was trained further than it shall be.

    Raises:
        ConflictError: It was.
    """
    if reached > settings.steps:
        raise ConflictError(
            f"{folder}: run {settings.name!r} was trained to step {reached:,} already, and steps = {settings.steps:,}; "
            f"say {reached} or more, or choose another name"
        )


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return settings by their whole names: ``optim.lr``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


def valid_states(folder: Path) -> list[Path]:
    """Return the finished states in a folder, oldest first; bytes are compared when one is loaded."""
    return sorted(path.parent for path in folder.glob(f"step_*/{MANIFEST}"))
