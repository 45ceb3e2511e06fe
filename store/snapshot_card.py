"""This module writes a snapshot's dataset card; every number in it comes from the manifest and the lake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

SHOWN = 12
"""Values of a label that the card lists; of those left over it says how many they are."""
SHOWN_LABELS = ("organism", "tissue", "assay", "disease", "cell_type", "perturbation")


def write_card(manifest: dict[str, Any], labels: dict[str, dict[str, dict[str, int]]], datasets: pa.Table) -> str:
    """Return the card as Markdown with a YAML front matter, in the manner of the Hugging Face hub.

    Args:
        manifest: The snapshot's.
        labels: Field to value to cells of each split.
        datasets: The lake's datasets.
    """
    settings, name = manifest["settings"], manifest["name"]
    chosen = {key: value for key, value in settings.items() if value}
    lines = [
        "---",
        "library_name: somaflow",
        "tags: [single-cell, tiledb-soma, snapshot]",
        "---",
        "",
        f"# {name}",
        "",
        f"{manifest['n_cells']:,} cells of {len(datasets_of(labels))} datasets, shuffled, from lake commit "
        f"{manifest['commit']} (`{manifest['commit_id'][:16]}`, TileDB timestamp {manifest['lake_timestamp']}); made "
        f"{manifest['created']}, id `{manifest['id'][:16]}`.",
        *([f"{manifest['n_without']:,} cells have no value here."] if manifest.get("n_without") else []),
        *(
            f"Unit of {name}: {', '.join(f'{unit} ({n_cells:,} cells)' for unit, n_cells in units.items())}."
            for name, units in manifest["units"].items()
            if units
        ),
        "",
        "Query and settings:",
        "",
        *(f"- `{key}`: `{value}`" for key, value in chosen.items()),
        "",
        *_table(("split", "cells"), [(split, f"{cells:,}") for split, cells in manifest["splits"].items()]),
        *_table(
            ("measurement", "features", "values", "vocabulary"),
            [
                (key, f"{one['n_features']:,}", f"{one['nnz']:,}", f"`{one['vocabulary_hash'][:16]}`")
                for key, one in manifest["measurements"].items()
            ],
        ),
        *_table(
            ("part", "rows", "checksums"),
            [(one["name"], f"{one['n_rows']:,}", f"`{one['checksums'][:16]}`") for one in manifest["parts"]],
        ),
        "## Datasets",
        "",
        "Licences are those of the datasets; cite them.",
        "",
        *_table(("dataset", "cells", "collection", "citation", "source"), _sources(labels, datasets)),
        "## Cells",
        "",
    ]
    for field in SHOWN_LABELS:
        counts = {value: sum(of.values()) for value, of in labels[field].items()}
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        shown = [(value or "(not said)", f"{cells:,}") for value, cells in ranked[:SHOWN]]
        if len(ranked) > SHOWN:
            left = ranked[SHOWN:]
            shown.append((f"{len(left):,} more", f"{sum(cells for _, cells in left):,}"))
        lines += _table((field.replace("_", " "), "cells"), shown)
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())
    lines += [
        "## Use",
        "",
        "```python",
        "from store.snapshot import open_snapshot",
        "from train.stream import Stream",
        "",
        f'for cells in Stream(open_snapshot("lake", "{name}"), batch=256).epoch(0):',
        "    ...",
        "```",
        "",
        f"The arrays also open with tiledbsoma alone. Written with {versions}. Counts are the sources' raw counts; a",
        "feature that a dataset did not measure is absent there, not zero (see `presence`).",
        "",
    ]
    return "\n".join(lines)


def datasets_of(labels: dict[str, dict[str, dict[str, int]]]) -> dict[str, int]:
    """Return the datasets that have cells, and how many."""
    counts = {value: sum(of.values()) for value, of in labels["dataset_id"].items()}
    return {value: cells for value, cells in counts.items() if cells}


def _sources(labels: dict[str, dict[str, dict[str, int]]], datasets: pa.Table) -> list[tuple[str, ...]]:
    known = {line["dataset_id"]: line for line in datasets.to_pylist()}
    rows = []
    for value, cells in sorted(datasets_of(labels).items()):
        line = known.get(value, {})
        said = [line.get(key) or "" for key in ("collection_name", "citation", "source_kind")]
        rows.append((value, f"{cells:,}", *said))
    return rows


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table; a bar in a text would begin another column."""
    body = [" | ".join(str(part).replace("|", "\\|").replace("\n", " ") for part in row) for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {line} |" for line in body), ""]
