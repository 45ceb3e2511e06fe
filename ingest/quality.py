"""This module sums up the quality of a dataset: cells, features, depth, share mapped, share mitochondrial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import records
from store.schema import DatasetPlan

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def summary(cells: dict[str, dict[str, NDArray[Any]]], plan: DatasetPlan, mapped: dict[str, float]) -> dict[str, Any]:
    """Return a dataset's figures by measurement.

    Args:
        cells: Measurement to what the checks found of each cell: ``nnz_C``, ``sum_C``, ``mito_C``.
        plan: The dataset.
        mapped: Measurement to the share of the source's features that came to an id of the vocabulary.

    Returns:
        For each measurement ``cells`` (with any value), ``features``, ``nnz``, quantiles of the cells' totals (``sum``)
        and of their features (``detected``), ``mito`` (median share of counts in mitochondrial genes; none where
        there are no such genes) and ``mapped``.
    """
    found = {}
    for name, columns in cells.items():
        filled = columns["nnz_C"] > 0
        totals, detected = columns["sum_C"][filled], columns["nnz_C"][filled]
        mito = columns["mito_C"][filled]
        counted = plan.layer(name) == "raw" and len(totals)
        found[name] = {
            "layer": plan.layer(name),
            "cells": int(filled.sum()),
            "empty_cells": int((~filled).sum()),
            "features": len(plan.features[name]),
            "nnz": int(detected.sum()),
            "sum": _quantiles(totals),
            "detected": _quantiles(detected),
            "mito": float(np.median(mito / np.maximum(totals, 1))) if counted and mito.any() else None,
            "mapped": round(mapped[name], 4),
        }
    return found


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {}
    return {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}


def keep(lake_uri: str, plan_number: int, figures: dict[str, Any]) -> None:
    """Write a dataset's figures into its lake."""
    records.replace(_uri(lake_uri, plan_number), figures)


def read(lake_uri: str, plan_numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Read datasets' figures, all at once; empty where there are none."""
    found = records.read_each([_uri(lake_uri, number) for number in plan_numbers])
    return [figures or {} for figures in found]


def _uri(lake_uri: str, plan_number: int) -> str:
    return records.join(lake_uri, records.FOLDER, "quality", f"{plan_number:012d}.json")
