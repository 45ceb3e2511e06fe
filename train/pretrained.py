"""This module loads checkpoints from a folder or from a Hugging Face hub, and saves them as they are loaded.

A checkpoint on a hub is the same files as in a folder; only those are fetched, into the hub's usual cache, and each is
compared with the manifest like any other checkpoint's.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from store.errors import ConflictError, InputRefused, MissingError, StorageError, UsageError
from train import checkpoint
from train.adapter import DEFAULT, WEIGHTS, attach, attached, chosen, merged, use
from train.card import card_of
from train.checkpoint import EXPORTED, MANIFEST, REFERENCE
from train.predictor import Predictor

SCHEME = "hf://"
NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
OWN = ("format", "files", "model_sha256", "vocabulary_hash", "created", "versions", "code_commit", "adapter_sha256")
"""What a manifest says of its own files: a checkpoint that is saved again says it anew."""
MERGED = {"base_sha256": "model_sha256", "adapter_sha256": "adapter_sha256"}
"""What the manifest of a merged model says of base and adapter, and by what names theirs said it."""
LEARNED = ("snapshot", "settings", "chosen")
"""What an adapter's manifest says of the cells it learned from; that of a model that uses it says so by "adapted"."""


class Repository(NamedTuple):
    """Where on a hub a checkpoint or an adapter is; without a revision, the newest of its main branch."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision else "")


def from_pretrained(
    where: str | Path,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    adapter: str | Path | None = None,
    device: str = "cpu",
) -> Predictor:
    """Load a checkpoint, and an adapter for it if one is named.

    Args:
        where: A folder, or ``hf://owner/name`` or ``hf://owner/name@revision`` on the hub that HF_ENDPOINT names.
        revision: A branch, tag or commit on the hub.
        cache: Where files from a hub are kept; the hub's usual cache (HF_HOME) if left out.
        adapter: A saved adapter, written like ``where``; the predictor answers with it.
        device: Where the model is put.

    Raises:
        UsageError: ``where`` is neither, or a folder is asked for a revision, or two revisions are named.
        MissingError: No checkpoint there; no such repository or revision.
        StorageError: The hub cannot be reached, or lets nobody in, and the cache does not hold all files.
        InputRefused: A file differs from the manifest, or the adapter belongs to another checkpoint.
    """
    with _folder(where, revision, cache, (*EXPORTED, REFERENCE)) as folder:
        loaded = checkpoint.load(folder, device)
    if adapter is not None:
        with _folder(adapter, None, cache, (WEIGHTS,)) as folder:
            model = attach(loaded.model, {DEFAULT: folder}, loaded.manifest)
            said = checkpoint.read_manifest(folder)
        learned = {key: said[key] for key in LEARNED if key in said}
        used = {
            "adapter_sha256": said["adapter_sha256"],
            "adapted": [*loaded.manifest.get("adapted", []), learned],
        }
        use(model, DEFAULT)
        loaded = replace(loaded, model=model, manifest=loaded.manifest | used, reference=None)  # it moves cells
    return Predictor(loaded, device)


def save_pretrained(predictor: Predictor, folder: str | Path) -> Path:
    """Save a checkpoint that answers as a predictor does; a checkpoint that stands there is replaced whole.

    An adapter that the predictor uses is merged into the weights, within float rounding, and the manifest says so.

    Raises:
        ConflictError: Something that is no checkpoint is there.
    """
    folder = Path(folder).resolve()
    checked = all((folder / name).is_file() for name in (MANIFEST, *EXPORTED))
    if folder.exists() and not checked and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder}: holds something that is no checkpoint; choose another folder or remove it")
    model, known = predictor.model, predictor.manifest
    kept = {key: value for key, value in known.items() if key not in OWN}
    kept |= {"measurements": list(predictor.vocabulary), "prompt_fields": list(model.config.n_prompts)}
    kept["trained"] = known.get("trained") or {
        key: known[key] for key in ("created", "versions", "code_commit") if key in known
    }
    if chosen(model) is not None:
        kept["merged"] = {key: str(known.get(own, "")) for key, own in MERGED.items()}
    plain = merged(model) if attached(model) else model
    parts = (predictor.tokens, predictor.vocabulary, predictor.prompts)
    return checkpoint.export(folder, plain, *parts, kept, card_of(kept), predictor.reference)


@contextmanager
def _folder(where: str | Path, revision: str | None, cache: Path | None, names: tuple[str, ...]) -> Iterator[Path]:
    """Yield a local folder with the files."""
    if not str(where).startswith(SCHEME):
        yield _local(where, revision)
        return
    repository = _parse(str(where), revision)
    snapshot = _download(repository, cache, names)
    home = snapshot.parents[1]
    with tempfile.TemporaryDirectory(dir=home if os.access(home, os.W_OK) else None) as plain:
        for name in (MANIFEST, *names):
            if (snapshot / name).is_file():
                _place((snapshot / name).resolve(), Path(plain) / name)
        try:
            yield Path(plain)
        except (InputRefused, MissingError) as error:
            said = str(error).replace(plain, f"{SCHEME}{repository.name}@{snapshot.name}")
            raise type(error)(f"{said} (what was fetched lies in {home})") from error


def _local(where: str | Path, revision: str | None) -> Path:
    if "://" in str(where):
        raise UsageError(f"{where}: give a folder, or {SCHEME}owner/name; copy what is elsewhere to a folder first")
    if revision is not None:
        raise UsageError(f"{where}: revision={revision!r} is for a hub ({SCHEME}owner/name); a folder has none")
    if not Path(where).is_dir() and re.fullmatch(NAME, str(where)):
        raise MissingError(f"{where}: no such folder; a checkpoint on a hub is written {SCHEME}{where}")
    return Path(where)


def _parse(where: str, revision: str | None) -> Repository:
    found = re.fullmatch(rf"{SCHEME}({NAME})(?:@(\S+))?", where)
    if found is None:
        raise UsageError(f"{where}: write {SCHEME}owner/name, or {SCHEME}owner/name@revision")
    if revision is not None and found[2] is not None and found[2] != revision:
        raise UsageError(f"{where}: revision={revision!r} says another; name one")
    return Repository(found[1], revision or found[2])


def _place(source: Path, target: Path) -> None:
    """Let a file of the cache stand in a folder without the cache's symbolic links, which no checkpoint may have."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or a cache of somebody else's
        shutil.copyfile(source, target)


def _download(repository: Repository, cache: Path | None, names: tuple[str, ...]) -> Path:
    """Fetch files that the cache does not hold; return the commit's folder in it, whose name is the commit."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repository.name,
            revision=repository.revision,
            cache_dir=cache,
            allow_patterns=[MANIFEST, *names],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except errors.GatedRepoError as error:
        raise StorageError(
            f"{repository}: its owner lets in whom they know; ask on its page, then log in: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MissingError(
            f"{repository}: no such repository, or it is private; look at its name, or log in: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingError(
            f"{repository}: the repository has no such branch, tag or commit; leave the revision out for the newest"
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repository}: no name of a repository: {error}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(
            f"{repository}: not all files are in the cache, and the hub does not give them ({reason}); look at the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE, or copy the checkpoint to a folder and name that"
        ) from error
    return Path(folder)
