"""This module keeps a transition head: fitted on a snapshot's training cells, written to a folder, loaded to answer.

A folder holds arrays (safetensors), words (JSON) and last a manifest with the SHA-256 of both: nothing in it can run
code. The baseline is not written but learned again from the effects that it was learned from, which are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA

from store.errors import ConflictError, InputRefused, UsageError
from store.schema import UNKNOWN
from store.snapshot import open_snapshot
from train.checkpoint import read_manifest, sha256, whole, write_manifest
from train.evaluation.context import BETWEEN, context_of, values_of
from train.evaluation.effects import Effects
from train.evaluation.floor import effect_floor
from train.evaluation.flow import Flow, FlowSettings
from train.evaluation.folds import TARGET
from train.evaluation.gated import Gate, GatedEffects, Space, TargetVectors
from train.evaluation.study import only_measured, read_study
from train.knowledge import read_sets
from train.transition import Transition, TransitionConfig

ARRAYS, WORDS = "head.safetensors", "head.json"


@dataclass(frozen=True)
class HeadSettings:
    """What a head is fitted on.

    Attributes:
        lake, snapshot: Whose cells.
        split: The split that is learned from.
        measurement: What is predicted.
        columns: What makes a context.
        by: What the head will meet for the first time, and so is held out in turn to choose and to calibrate: "target",
            "perturbation" or one of the columns.
        sets: GMT files of gene sets: what is known of targets.
        seed: Of folds and flows.
        max_cells: Cells that are read at most.
    """

    lake: str
    snapshot: str
    split: str = "train"
    measurement: str = "RNA"
    columns: tuple[str, ...] = ("cell_type",)
    by: str = "target"
    sets: tuple[str, ...] = ()
    seed: int = 0
    max_cells: int = 100_000


def fit_head(settings: HeadSettings, folder: str | Path) -> GatedEffects:
    """Fit a head and write it.

    Raises:
        UsageError: ``by`` is nothing that a head holds out.
        InputRefused: The split has no cells, or none with the measurement, or too few perturbations to hold some out.
        ConflictError: There is something in the folder.
    """
    if settings.by not in (known := (TARGET, "perturbation", *settings.columns)):
        raise UsageError(
            f"by = {settings.by!r}: a head can hold out {', '.join(known)}; name its context's columns (--context)"
        )
    folder = Path(folder)
    if folder.exists():
        raise ConflictError(f"{folder}: there is something already; name another folder, or remove it")
    snapshot = open_snapshot(settings.lake, settings.snapshot)
    study = read_study(snapshot, settings.max_cells)
    chosen_C = (study.label("split") == settings.split) & (study.label("perturbation") != UNKNOWN)
    if not chosen_C.any():
        raise InputRefused(f"snapshot {settings.snapshot!r} has no cells in split {settings.split!r}")
    train = only_measured(study.take(chosen_C), [settings.measurement])
    members = read_sets(settings.sets)
    head = GatedEffects(
        settings.measurement,
        settings.columns,
        settings.by,
        TargetVectors(members),
        effect_floor(settings.measurement, settings.columns, members),
        seed=settings.seed,
    ).fit(train)
    source = {
        "snapshot": {"name": snapshot.name, "id": snapshot.id, "commit_id": snapshot.commit_id},
        "settings": asdict(settings),
        "knowledge": {path: sha256(Path(path)) for path in settings.sets},
        "cells": {"learned_from": train.n_cells, "left_out": train.left_out},
    }
    save_head(folder, head, members, source)
    return head


def save_head(folder: Path, head: GatedEffects, members: dict[str, tuple[str, ...]], source: dict[str, Any]) -> Path:
    """Write a fitted head; the folder appears whole.

    Args:
        folder: Where; it does not exist.
        head: The head.
        members: Set to its members, as its targets and baselines know them.
        source: Where it comes from, for the manifest.
    """
    table, space = head.table, head.space
    arrays: dict[str, NDArray[Any]] = {
        "control_EG": table.control_EG,
        "treated_EG": table.treated_EG,
        "n_cells": table.n_cells,
        "noise_E": table.noise_E,
        "control_noise_E": table.control_noise_E,
        "chosen": space.pca.features.chosen,
        "components": space.pca.pca.components_,
        "mean": space.pca.pca.mean_,
        "factor_G": space.factor_G,
        "usual_G": head.usual_G,
        "score": head.score_EG,
    }
    given = sorted(head.targets.given)
    if given:
        arrays["given"] = np.stack([head.targets.given[name] for name in given])
    flows = getattr(head, "flows", []) if head.gate.g else []
    for number, flow in enumerate(flows):
        arrays |= {f"flow{number}.{name}": part.numpy() for name, part in flow.network.state_dict().items()}
        arrays |= {f"flow{number}.mean_P": flow.mean_P, f"flow{number}.spread_P": flow.spread_P}
    words = {
        "measurement": head.measurement,
        "columns": head.columns,
        "by": head.by,
        "seed": head.seed,
        "settings": asdict(head.settings),
        "gate": asdict(head.gate),
        "perturbation": table.perturbation,
        "context": [values_of(where) for where in table.context],
        "features": table.features,
        "called": table.called,
        "label_E": head.label_E.tolist(),
        "members": members,
        "given": given,
        "flows": [{"scale": flow.scale, "sizes": asdict(flow.network.config)} for flow in flows],
    }
    with whole(folder) as new:
        save_file({name: np.ascontiguousarray(part) for name, part in arrays.items()}, new / ARRAYS)
        (new / WORDS).write_text(json.dumps(words), encoding="utf-8")
        write_manifest(new, {"kind": "head", **source})
    return folder


def load_head(folder: str | Path) -> GatedEffects:
    """Load a head that answers as the one that was written, bit for bit: ``predict`` and ``interval``.

    Raises:
        MissingError: There is none.
        InputRefused: It is damaged or something else.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.get("kind") != "head" or not {ARRAYS, WORDS} <= set(manifest["files"]):
        raise InputRefused(f"{folder}: not a transition head; python -m train head writes one")
    try:
        return _made(load_file(folder / ARRAYS), json.loads((folder / WORDS).read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, RuntimeError, StopIteration, SafetensorError) as error:
        raise InputRefused(f"{folder}: not a head of this version: {error!r}") from error


def _context(said: list[str] | str, n_columns: int) -> str:
    """Return a context by its columns' values; heads of before said it in one, with nothing marked."""
    if isinstance(said, str):
        said = said.split(BETWEEN) if n_columns > 1 else [said]
    return context_of(said)


def _made(arrays: dict[str, NDArray[Any]], words: dict[str, Any]) -> GatedEffects:
    columns = tuple(words["columns"])
    members = {name: tuple(inside) for name, inside in words["members"].items()}
    given = dict(zip(words["given"], arrays["given"], strict=True)) if words["given"] else None
    head = GatedEffects(
        words["measurement"],
        columns,
        words["by"],
        TargetVectors(members, given),
        effect_floor(words["measurement"], columns, members),
        FlowSettings(**words["settings"]),
        words["seed"],
    )
    head.table = Effects(
        tuple(words["perturbation"]),
        tuple(_context(where, len(columns)) for where in words["context"]),
        arrays["control_EG"],
        arrays["treated_EG"],
        arrays["n_cells"],
        arrays["noise_E"],
        arrays.get("control_noise_E", np.zeros_like(arrays["noise_E"])),  # heads of before did not reckon with it
        tuple(words["features"]),
        tuple(words.get("called", ())),
    )
    head.gate = Gate(**words["gate"])
    head.baseline = next(one for one in head.candidates if one.name == head.gate.baseline).learn(head.table)
    head.space = Space(head.measurement, head.seed)
    head.space.pca.features.chosen = arrays["chosen"]
    head.space.pca.pca = PCA(len(arrays["components"]))
    head.space.pca.pca.components_, head.space.pca.pca.mean_ = arrays["components"], arrays["mean"]
    head.space.loading_GK = np.zeros((len(words["features"]), len(arrays["components"])))
    head.space.loading_GK[arrays["chosen"]] = arrays["components"].T
    head.space.factor_G = arrays["factor_G"]
    head.known = head.targets.beside(head.table.places, head.space.loading_GK)
    head.usual_G, head.score_EG = arrays["usual_G"], arrays["score"]
    head.label_E = np.array(words["label_E"])
    head.flows = []
    for number, one in enumerate(words["flows"]):
        start = f"flow{number}."
        mine = {name.removeprefix(start): part for name, part in arrays.items() if name.startswith(start)}
        mean_P, spread_P = mine.pop("mean_P"), mine.pop("spread_P")
        network = Transition(TransitionConfig(**one["sizes"]))
        network.load_state_dict({name: torch.from_numpy(part) for name, part in mine.items()})
        head.flows.append(Flow(network.eval(), one["scale"], mean_P, spread_P))
    return head
