"""This module writes a checkpoint's model card; every number in it comes from the run, its snapshot and the lake.

What the card says of the data is described once, as values that a manifest can keep: with the manifest alone, the card
of a checkpoint that is saved again is written again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from store.errors import StorageError
from store.lake import open_lake
from store.snapshot import Snapshot
from store.snapshot_card import datasets_of
from train.settings import RunSettings

SHOWN = 12
"""Values of a label that the card lists; of those left over it says how many they are."""
SHOWN_LABELS = ("organism", "tissue", "assay")
LICENCES = {"CZ CELLxGENE Discover": "cc-by-4.0"}
"""A distributor, as citations name it, to the licence of all that it distributes; no source says more of licences."""


def write_card(snapshot: Snapshot, settings: RunSettings, provenance: dict[str, Any]) -> str:
    """Return the card of a run's export, as Markdown with a YAML front matter, in the manner of the Hugging Face hub.

    Args:
        snapshot: What the run was trained on.
        settings: The run's.
        provenance: What the manifest says: step, settings, figures; "data" is described here where it is not there.
    """
    data = provenance.get("data") or describe(snapshot, settings.data.split)
    return card_of(provenance | {"data": data, "settings": settings.model_dump(mode="json")})


def describe(snapshot: Snapshot, split: str) -> dict[str, Any]:
    """Return what a card says of the data, in values that JSON knows.

    Args:
        snapshot: The data.
        split: The one that is trained on.
    """
    manifest, labels = snapshot.manifest, snapshot.label_values()
    cells = {
        field: [
            {"value": value, "cells": sum(of.values()), "trained": of.get(split, 0)}
            for value, of in labels[field].items()
        ]
        for field in SHOWN_LABELS
    }
    return {
        "split": split,
        "splits": snapshot.splits,
        "query": {key: value for key, value in manifest["settings"].items() if value},
        "commit": manifest["commit"],
        "measurements": {
            name: {"n_features": entry["n_features"], "nnz": entry["nnz"]}
            for name, entry in manifest["measurements"].items()
        },
        "units": {name: list(units) for name, units in manifest.get("units", {}).items() if units},
        "cells": cells,
        "datasets": _datasets(snapshot, datasets_of(labels)),
    }


def _datasets(snapshot: Snapshot, cells: dict[str, int]) -> list[dict[str, Any]]:
    """Return what the lake knows of the datasets; one that it let go since keeps its name and its cells."""
    try:
        known = {line["dataset_id"]: line for line in open_lake(snapshot.lake_uri).datasets().to_pylist()}
    except StorageError:  # a snapshot can be trained on without its lake; the card then says that nothing is known
        known = {}
    found = []
    for name, count in sorted(cells.items()):
        line = known.get(name, {})
        said = {
            "title": line.get("dataset_title"),
            "collection": line.get("collection_name"),
            "citation": line.get("citation"),
            "doi": line.get("collection_doi"),
            "source": line.get("source_kind"),
        }
        said = {key: value or "" for key, value in said.items()}
        licence = next((licence for word, licence in LICENCES.items() if word in said["citation"]), "")
        found.append({"dataset_id": name, "cells": count, **said, "licence": licence})
    return found


def card_of(manifest: dict[str, Any]) -> str:
    """Return the card of a checkpoint from its manifest alone; what the manifest does not say is left out."""
    data, settings = manifest.get("data", {}), manifest.get("settings", {})
    lines = [*_front(manifest), f"# {settings.get('name', 'A model of cells')}", "", *_summary(manifest)]
    lines += ["## Data", "", *_data(manifest)]
    lines += _cells(data)
    lines += _figures(manifest)
    lines += _use(manifest)
    return "\n".join([*lines, *_loading(manifest)])


def _front(manifest: dict[str, Any]) -> list[str]:
    """Return the front matter; each value is JSON, which YAML reads, so that no name can break it."""
    data = manifest.get("data", {})
    measurements = list(data.get("measurements", manifest.get("measurements", [])))
    organisms = [one["value"] for one in data.get("cells", {}).get("organism", []) if one["trained"] and one["value"]]
    values = {
        "library_name": "somaflow",
        "tags": ["single-cell", "multimodal", "masked-model", *organisms, *measurements],
        "license": _licence(data.get("datasets", [])),
        "model-index": _index(manifest),
    }
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items() if value), "---", ""]


def _licence(datasets: list[dict[str, Any]]) -> str:
    """Return the licence of the data, by its name on the hub: one that they share, "other", or "unknown"."""
    licences = {one["licence"] for one in datasets}
    if len(licences) == 1 and "" not in licences:
        return str(licences.pop())
    return "other" if licences - {""} else "unknown"


def _index(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures on held-out cells in the hub's form; none without such cells, or if they chose the weights."""
    loss, snapshot = manifest.get("figures", {}).get("loss_test"), manifest.get("snapshot", {})
    if not _is_number(loss) or manifest.get("chosen"):
        return []
    settings = manifest["settings"]
    result = {
        "task": {"type": "other", "name": "rebuild the hidden values of cells"},
        "dataset": {
            "type": "somaflow-snapshot",
            "name": snapshot["name"],
            "revision": snapshot["id"],
            "split": settings["data"]["test_split"],
        },
        "metrics": [{"type": "nll", "name": "mean negative log likelihood, nats", "value": loss}],
    }
    return [{"name": settings["name"], "results": [result]}]


def _summary(manifest: dict[str, Any]) -> list[str]:
    settings, figures = manifest.get("settings"), manifest.get("figures", {})
    said = ["A masked model of cells with prompts"]
    if settings:
        said.append(
            f", trained for {manifest['global_step']:,} steps of {settings['data']['global_batch']} cells; width "
            f"{settings['model']['width']}, {settings['model']['layers']} blocks"
        )
    if "parameters" in figures:
        said.append(f", {figures['parameters']:,} parameters")
    lines = ["".join(said) + ".", ""]
    if "merged" in manifest:
        base = manifest["merged"]["base_sha256"]
        lines += [f"An adapter is merged into its weights; the base is the checkpoint with model_sha256 `{base}`.", ""]
    return lines


def _data(manifest: dict[str, Any]) -> list[str]:
    data, snapshot = manifest.get("data"), manifest.get("snapshot")
    lines = []
    if snapshot:
        lines += [
            f"Snapshot `{snapshot['name']}`, id `{snapshot['id']}`, of lake commit `{snapshot['commit_id']}` (TileDB "
            f"timestamp {snapshot['lake_timestamp']}).",
            "",
        ]
    if not data:
        return [*lines, "No more is known of the data.", ""]
    lines += ["Query and settings:", "", *(f"- `{key}`: `{value}`" for key, value in data["query"].items()), ""]
    lines += [f"Unit of {name}: {', '.join(units)}.\n" for name, units in data.get("units", {}).items()]
    lines += _table(
        ("split", "cells", ""),
        [
            (split, f"{cells:,}", "trained on" if split == data["split"] else "")
            for split, cells in data["splits"].items()
        ],
    )
    lines += _table(
        ("measurement", "features", "values"),
        [(name, f"{one['n_features']:,}", f"{one['nnz']:,}") for name, one in data["measurements"].items()],
    )
    rows = [
        (
            one["dataset_id"],
            f"{one['cells']:,}",
            one["title"],
            one["collection"],
            " ".join(word for word in (one["citation"], one["doi"]) if word),
            one["source"],
            one["licence"] or "not known",
        )
        for one in data["datasets"]
    ]
    lines += [
        f"The cells are of {len(rows):,} datasets. Licences are those of the datasets, and cover what is learned from "
        "them as far as they say so; cite the datasets.",
        "",
        *_table(("dataset", "cells", "title", "collection", "citation", "source", "licence"), rows),
    ]
    return lines


def _cells(data: dict[str, Any]) -> list[str]:
    lines = []
    for field, values in data.get("cells", {}).items():
        ranked = sorted(values, key=lambda one: (-one["cells"], one["value"]))
        rows = [(one["value"] or "(not said)", f"{one['cells']:,}", f"{one['trained']:,}") for one in ranked[:SHOWN]]
        if left := ranked[SHOWN:]:
            sums = [sum(one[key] for one in left) for key in ("cells", "trained")]
            rows.append((f"{len(left):,} more", f"{sums[0]:,}", f"{sums[1]:,}"))
        lines += _table((field, "cells", "trained on"), rows)
    return lines


def _figures(manifest: dict[str, Any]) -> list[str]:
    figures = manifest.get("figures")
    if not figures:
        return []
    split, chosen = manifest["settings"]["data"]["test_split"], manifest.get("chosen")
    when = f"the lowest of {chosen['of']:,} looks" if chosen else "after training"
    rows = [
        ("loss, first step", _number(figures["loss_first"])),
        ("loss, last 20 steps", _number(figures["loss_last"])),
        (f"loss, split `{split}`, before training", _number(figures["loss_test_first"])),
        (f"loss, split `{split}`, {when}", _number(figures["loss_test"])),
    ]
    of_choice = " These weights were chosen by that split: its loss says less of other cells." if chosen else ""
    of_base = " The figures are the base's, from before an adapter was merged." if "merged" in manifest else ""
    return [
        "## Figures",
        "",
        f"Loss is the mean negative log likelihood per measured feature, in nats.{of_base}{of_choice}",
        "",
        *_table(("figure", "value"), rows),
    ]


def _use(manifest: dict[str, Any]) -> list[str]:
    asked = "embeddings of cells, and the predicted mean effect of perturbations that were seen in training"
    if manifest.get("settings", {}).get("model", {}).get("types"):
        asked += ", and cell types that were seen in training"
    return [
        "## Intended use and limits",
        "",
        f"For research: {asked}, of cells like those it was trained on.",
        "",
        "- What is rare above, or not there, was hardly learned or not at all: other organisms, tissues and assays.",
        "- The figures are of this run alone. It has not been compared with baselines on held-out perturbations or "
        "donors; `python -m train eval` does that.",
        "- Its answers carry no uncertainty, and a predicted effect is no proof of a cause.",
        "- It is not for clinical use: no diagnosis, no choice of a treatment.",
        "",
    ]


def _loading(manifest: dict[str, Any]) -> list[str]:
    first = next(iter(manifest.get("measurements", [])), "RNA")
    return [
        "## How to load it",
        "",
        "With the checkpoint's folder, or `hf://owner/name` where it lies on a hub; every file is compared with the",
        "SHA-256 in `manifest.json`.",
        "",
        "```python",
        "from train.pretrained import from_pretrained",
        "",
        'predictor = from_pretrained("path/to/checkpoint")',
        f'cells = predictor.cells({{"{first}": counts}})  # csr_matrix, columns as predictor.vocabulary["{first}"]',
        "embeddings = predictor.embed(cells)",
        "```",
        "",
        "Over HTTP: `python -m serve run path/to/checkpoint`.",
        "",
    ]


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)  # JSON's null and Python's NaN: nothing was held out


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and _is_number(value) else "not measured"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table; a bar in a text would begin another column."""
    body = [" | ".join(part.replace("|", "\\|").replace("\n", " ") for part in row) for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {line} |" for line in body), ""]
