"""This module saves and loads checkpoints: what is exported to be served, and the manifests that make it real.

A directory counts only with a valid ``manifest.json``, which is written last and holds the SHA-256 of every other file.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from store.errors import InputRefused, MissingError, UsageError
from store.lake import utc_now
from train.config import ModelConfig
from train.model import CellModel
from train.novelty import Reference
from train.tokens import TokenSettings

MANIFEST = "manifest.json"
FORMAT = 1
EXPORTED = ("README.md", "config.json", "model.safetensors", "vocabulary.json")
REFERENCE = "reference.safetensors"
VERSIONED = ("torch", "accelerate", "ray", "numpy", "safetensors", "tiledbsoma")


@dataclass(frozen=True)
class Vocabulary:
    """One measurement's features in the model's order."""

    feature_id: list[str]
    feature_name: list[str]
    organism: list[str]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded export: the model in evaluation mode and all that its inputs are coded with."""

    model: CellModel
    tokens: TokenSettings
    vocabulary: dict[str, Vocabulary]
    prompts: dict[str, list[str]]
    manifest: dict[str, Any]
    reference: Reference | None = None


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write a directory's manifest, whole and last."""
    files = {
        str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    temporary = folder / f".{MANIFEST}.{secrets.token_hex(4)}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({**values, "format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read a directory's manifest and compare every file with it.

    Raises:
        MissingError: There is no directory, or none with a manifest: it was never finished.
        InputRefused: The manifest is damaged or of another format, or a file that it names is missing or has other
            bytes.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
        digests = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(
            f"{folder}: no checkpoint here (no {MANIFEST}); a run leaves one in <output>/<name>/checkpoint"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputRefused(f"{folder / MANIFEST}: damaged: {error}") from None
    if found != FORMAT:
        raise InputRefused(f"{folder / MANIFEST}: format {found!r}; this version reads format {FORMAT}")
    for name, digest in digests.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise InputRefused(f"{path}: named in the manifest and not there; copy the checkpoint again")
        if sha256(path) != digest:
            raise InputRefused(f"{path}: its SHA-256 differs from the manifest's; copy the checkpoint again")
    return dict(manifest)


def export(
    folder: Path,
    model: CellModel,
    tokens: TokenSettings,
    vocabulary: dict[str, Vocabulary],
    prompts: dict[str, list[str]],
    provenance: dict[str, Any],
    card: str,
    reference: Reference | None = None,
) -> Path:
    """Write what is served: safetensors, JSON, a card, and the manifest last; one that stands there is replaced whole.

    Args:
        folder: The checkpoint's directory.
        model: Its weights go to ``model.safetensors``, its sizes to ``config.json``.
        tokens: How cells become tokens, to ``config.json``.
        vocabulary: Measurement to features, to ``vocabulary.json``.
        prompts: Prompt field to values, code by code, to ``vocabulary.json``.
        provenance: Snapshot, steps, seed and figures for the manifest.
        card: ``README.md``.
        reference: What is known, to tell novel cells by: to ``reference.safetensors``.
    """
    with whole(folder) as new:
        save_file({name: part.contiguous() for name, part in model.state_dict().items()}, new / "model.safetensors")
        _write_json(new / "config.json", {"model": asdict(model.config), "tokens": asdict(tokens)})
        words = {"features": {name: asdict(part) for name, part in vocabulary.items()}, "prompts": prompts}
        _write_json(new / "vocabulary.json", words)
        (new / "README.md").write_text(card, encoding="utf-8")
        if reference is not None:
            parts = {name: part.contiguous() for name, part in vars(reference).items()}
            save_file(parts, new / REFERENCE)
        manifest = {
            **provenance,
            "model_sha256": sha256(new / "model.safetensors"),
            "vocabulary_hash": sha256(new / "vocabulary.json"),
            "created": utc_now(),
            "versions": versions(),
            "code_commit": code_commit(),
        }
        write_manifest(new, manifest)
    return folder


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Lend an empty folder to fill, and put it in the place of another; readers find the one before or the new one.

    Where it is not filled, the one before stays. What a kill leaves beside it goes with the next. A file system that
    cannot swap folders (NFS) has none for the moment between two renames.
    """
    folder = folder.resolve()
    _forget(folder)
    new = _beside(folder)
    new.mkdir(parents=True)
    try:
        yield new
        if not _exchanged(new, folder):
            if folder.exists():
                os.replace(folder, _beside(folder))
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _forget(folder)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _forget(folder: Path) -> None:
    """Remove what was to replace a folder, or was replaced by it; where there is no folder, nothing."""
    ours = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}")
    for path in folder.parent.iterdir() if folder.exists() else ():
        if ours.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where one is not there or the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=None, sort_keys=True), encoding="utf-8")


def json_values(values: dict[str, Any]) -> dict[str, Any]:
    """Write what is no number as null: JSON has no NaN, and other people's parsers refuse it."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a checkpoint or a state depends on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def code_commit() -> str:
    """Return the git commit of the code, or "" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


def device_of(name: str) -> torch.device:
    """Return a device of this machine by torch's name for it.

    Raises:
        UsageError: Torch knows no such device, or this machine has none that torch can use.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: torch knows no such device; say cpu, or cuda for a GPU") from None
    if device.type == "cpu":
        return device
    own = torch.accelerator.current_accelerator(check_available=True)
    n_own = 0 if own is None else torch.accelerator.device_count()
    if own is None or own.type != device.type or (device.index or 0) >= n_own:
        has = f"{n_own} {own.type}" if own is not None else "none"
        raise UsageError(f"device {name!r}: torch {torch.__version__} finds {has} on this machine; say cpu")
    return device


def load(folder: str | Path, device: str = "cpu") -> Checkpoint:
    """Load an export after comparing every file with the manifest; nothing in it can run code.

    Raises:
        MissingError: No checkpoint there.
        InputRefused: It is damaged or of another format.
        UsageError: The device is not there.
    """
    folder, where = Path(folder), device_of(device)
    manifest = read_manifest(folder)
    if (kind := manifest.get("kind", "checkpoint")) != "checkpoint":
        raise InputRefused(f"{folder}: is no checkpoint, but of kind {kind}; name the checkpoint that it goes with")
    unlisted = [name for name in EXPORTED if name not in manifest["files"]]
    if unlisted:
        raise InputRefused(f"{folder / MANIFEST}: does not name {unlisted[0]}, which is served; export it again")
    if manifest.get("model_sha256") != manifest["files"]["model.safetensors"]["sha256"]:
        raise InputRefused(f"{folder / MANIFEST}: model_sha256 is not that of model.safetensors; export it again")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        for part, name in (("tokens", "hide"), ("tokens", "levels"), ("model", "levels")):
            config[part][name] = tuple(config[part][name])
        vocabulary = {name: Vocabulary(**part) for name, part in words["features"].items()}
        sizes = ModelConfig(**config["model"])
        ordered = {name: vocabulary[name] for name in manifest["measurements"]}
        model = CellModel(_in_order(sizes, manifest))
        model.load_state_dict(load_file(folder / "model.safetensors", device=device))
        tokens = TokenSettings(**config["tokens"])
        reference = Reference(**load_file(folder / REFERENCE)) if REFERENCE in manifest["files"] else None
    except (FileNotFoundError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputRefused(f"{folder}: not a checkpoint of this version: {error}") from error
    model = model.to(where).eval()
    return Checkpoint(model, tokens, ordered, dict(words["prompts"]), manifest, reference)


def _in_order(config: ModelConfig, manifest: dict[str, Any]) -> ModelConfig:
    """Put measurements and prompts back into the order they were trained in: sorted JSON does not keep it."""
    values = asdict(config)
    values["n_features"] = {name: values["n_features"][name] for name in manifest["measurements"]}
    values["n_prompts"] = {name: values["n_prompts"][name] for name in manifest["prompt_fields"]}
    return ModelConfig(**values)
