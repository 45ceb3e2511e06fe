"""This module writes a checkpoint's model card; every number in it comes from the run and its snapshot."""

from __future__ import annotations

from typing import Any

from store.snapshot import Snapshot
from train.settings import RunSettings


def write_card(snapshot: Snapshot, settings: RunSettings, provenance: dict[str, Any]) -> str:
    """Return the card as Markdown with a YAML front matter, in the manner of the Hugging Face hub."""
    figures = provenance["figures"]
    sizes = snapshot.manifest["measurements"]
    features = "\n".join(f"| {name} | {entry['n_features']:,} | {entry['nnz']:,} |" for name, entry in sizes.items())
    return f"""---
library_name: somaflow
tags: [single-cell, multimodal, masked-model]
---

# {settings.name}

A masked model of cells with prompts, trained for {provenance["global_step"]:,} steps of
{settings.data.global_batch} cells; {figures["parameters"]:,} parameters, width {settings.model.width},
{settings.model.layers} blocks.

## Data

Snapshot `{snapshot.name}` (id `{snapshot.id[:16]}`), {snapshot.n_cells:,} cells of {len(snapshot.datasets)} datasets
({", ".join(snapshot.datasets)}), from lake commit `{snapshot.commit_id[:16]}`. Splits: {snapshot.manifest["splits"]}.
Licences are those of the datasets; see the lake's `census_info/datasets`.

| measurement | features | non-zero counts |
|---|---|---|
{features}

## Figures

Loss (mean negative log likelihood per measured feature, nats): first step {figures["loss_first"]:.4f}, last 20 steps
{figures["loss_last"]:.4f}; split `{settings.data.test_split}` {figures["loss_test_first"]:.4f} before training,
{figures["loss_test"]:.4f} after.

## Use and limits

Embeddings of cells, and the predicted mean effect of perturbations that were seen in training, on cells like those it
was trained on. It has not been compared with baselines on held-out perturbations or donors; it gives no uncertainty;
it is not for clinical use.
"""
