"""This module holds the messages about cells that are looked at together, as the page at ``/`` does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.messages import (
    AnnotateOptions,
    Annotation,
    Counts,
    Coverage,
    FeatureEffect,
    Name,
    Names,
    Numbers,
    Prompts,
    Provenance,
    Reply,
    Request,
    Tensor,
    TypeProbability,
)

Positions = Annotated[
    Annotated[list[int], Field(fail_fast=True, min_length=1)] | None,
    Field(description="Positions of cells, the first is 0; all when left out."),
]


class ExploreRequest(Request):
    """Cells to look at together."""

    counts: Counts
    prompts: Prompts = Field(default_factory=dict)
    labels: dict[Name, Names | Numbers] = Field(
        default_factory=dict,
        max_length=32,
        description="What is known of the cells and may colour them, one value per cell; the model is not told.",
    )


class ExploreDataset(Request):
    """Cells that the server offers."""

    dataset: Name = Field(description="One of GET /v1/datasets.")


class Dataset(Reply):
    """Cells that the server offers to look at."""

    name: str
    form: Literal["h5ad", "snapshot"]


class DatasetsReply(Reply):
    """All cells that the server offers, and what may be sent instead."""

    datasets: list[Dataset]
    body_bytes: int = Field(description="Largest h5ad file that may be sent.")
    limits: dict[str, int | float] = Field(description="Of cells that are looked at together.")


class Label(Reply):
    """One thing that is known of each cell: either words, as codes (-1: not known), or numbers."""

    name: str
    values: list[str] | None = None
    codes: Tensor | None = None
    numbers: Tensor | None = None


class View(Reply):
    """Where cells lie and what they are."""

    projection: Literal["umap", "principal components"]
    fitted: int = Field(description="Cells that the projection was fitted to; the others are placed among them.")
    positions: Tensor = Field(description="[cells, 2]")
    types: list[str] = Field(description="Cell types; empty where the model does not tell them.")
    type: Tensor | None = Field(default=None, description="Code of each cell's likeliest type.")
    probability: Tensor | None = Field(default=None, description="Its probability.")
    novelty_p: Tensor | None = Field(default=None, description="As POST /v1/annotate has it, where there is one.")
    labels: list[Label]
    measurements: dict[str, int] = Field(description="Measurement to features that have counts in these cells.")
    coverage: dict[str, Coverage]


class ExploreReply(Reply):
    """A set of cells that the server keeps for a while, and how far it is with it."""

    session: str = Field(description="By which later requests name these cells; whoever knows it can ask about them.")
    name: str
    state: Literal["reading", "embedding", "placing", "ready"]
    share: float = Field(description="How much of the state's work is done, 0 to 1.")
    cells: int
    notes: list[str]
    view: View | None = None
    provenance: Provenance | None = None


class SelectRequest(Request):
    """Cells of a session, and how their types are told."""

    cells: Positions = None
    options: AnnotateOptions = AnnotateOptions()


class Called(Reply):
    """How many cells are called so."""

    cell_type: str
    cell_type_id: str
    cells: int


class CellAnnotation(Annotation):
    """What one of the selected cells is."""

    cell: int
    name: str


class SelectionReply(Reply):
    """What selected cells are: each for itself, and together."""

    cells: int
    called: list[Called] = Field(description="The most frequent first, `unknown` among them.")
    types: list[TypeProbability] = Field(description="Mean probability over the cells, likeliest first.")
    covering: str = Field(description="The ontology's nearest type above those that are likely together.")
    covering_id: str
    novelty_p: float | None = Field(default=None, description="Median over the cells.")
    each: list[CellAnnotation] = Field(description="The first cells of the selection.")
    warnings: list[str] = Field(description="What of the options has no effect.")
    provenance: Provenance


class ShiftRequest(Request):
    """Cells of a session, and perturbations whose effect on them is asked."""

    cells: Positions = None
    perturbations: list[Name | Names] = Field(
        min_length=1, description="Targets from GET /v1/perturbations; a list of targets is one combined perturbation."
    )
    top: int = Field(default=10, ge=0, le=1_000, description="Features to list that go up, and that go down.")


class MeasurementShift(Reply):
    """Predicted mean expression of selected cells without and with a perturbation."""

    up: list[FeatureEffect]
    down: list[FeatureEffect]
    size: float = Field(description="Root of the mean squared change over all features.")
    control: Tensor
    delta: Tensor


class PerturbationShift(Reply):
    """What one perturbation is predicted to do to selected cells."""

    perturbation: str
    asked: str = Field(description="Its targets as the request named them, those of a list joined by `+`.")
    effects: dict[str, MeasurementShift]


class ShiftReply(Reply):
    """One shift per perturbation, in the order of the request."""

    shifts: list[PerturbationShift]
    cells: int
    averaged: int = Field(description="Cells over which the effects are averaged, drawn at random of those asked.")
    provenance: Provenance


class ExpressionReply(Reply):
    """One feature's value in each cell, as it was measured; NaN where it was not."""

    feature_id: str
    feature_name: str
    measurement: str
    unit: str
    values: Tensor
    provenance: Provenance


class FoundFeature(Reply):
    """A feature whose name fits."""

    feature_id: str
    feature_name: str
    cells: int = Field(description="Cells of the session that have counts of it.")


class FoundFeaturesReply(Reply):
    """Features whose names fit."""

    features: list[FoundFeature]


H5AD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/x-hdf5": {"schema": {"type": "string", "format": "binary"}}},
    }
}
