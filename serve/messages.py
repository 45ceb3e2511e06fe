"""This module holds the requests and replies of the HTTP interface; their descriptions are the API's manual."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag
from pydantic.config import JsonDict


class Request(BaseModel):
    """A closed message from a client: an unknown key, or a text where a number belongs, is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Reply(BaseModel):
    """A closed message to a client."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(max_length=256)]
Names = Annotated[list[Name], Field(fail_fast=True)]
Integers = Annotated[list[int], Field(fail_fast=True)]
Numbers = Annotated[list[float], Field(fail_fast=True)]
Encoding = Literal["float", "base64"]


class CsrCounts(Request):
    """Counts of all cells as a compressed sparse row matrix: cell i owns entries ``indptr[i]`` to ``indptr[i + 1]``."""

    features: Names = Field(description="Feature ids (Ensembl) or symbols, one per column.", min_length=1)
    indptr: Integers = Field(description="Starts with 0, never falls; one more than the cells.")
    indices: Integers = Field(description="Column of each entry, a position in `features`.")
    data: Numbers = Field(
        description="Raw count of each entry, 0 to 2^24; of a measurement of levels, any finite number, zeros too."
    )
    _others: list[list[str]] = PrivateAttr(default_factory=list)

    @property
    def others(self) -> list[list[str]]:
        """Further names of the same features, of a file; those are taken that the model knows most of."""
        return self._others


CellCounts = Annotated[
    dict[Name, float | None],
    Field(
        examples=[{"CD3D": 4, "IL7R": 2}],
        description="Of a measurement of levels, a zero was measured, and null is as a feature that is left out.",
    ),
]


def _form(value: Any) -> str:
    return "cells" if isinstance(value, list) else "csr"


Measurement = Annotated[
    Annotated[CsrCounts, Tag("csr")] | Annotated[list[CellCounts], Tag("cells"), Field(fail_fast=True)],
    Discriminator(_form),
]
Counts = Annotated[
    dict[Name, Measurement],
    Field(
        min_length=1,
        max_length=16,
        description="Raw counts under the name of the measurement (RNA, protein, ATAC, ...): either one CSR matrix or "
        "a list with one {feature: count} object per cell. Every measurement lists the same cells in the same order; a "
        "measurement that is left out was not measured.",
    ),
]
Prompts = Annotated[
    dict[Name, Name | float | Names | Numbers],
    Field(
        max_length=32,
        description="What is known about the cells, as one value for all or one per cell; values from GET /v1/prompts, "
        "numbers for time and dose.",
        examples=[{"organism": "homo_sapiens", "tissue": ["blood", "lung"]}],
    ),
]

_CELLS_EXAMPLE: JsonDict = {"RNA": [{"CD3D": 4, "IL7R": 2, "LTB": 7}, {"MS4A1": 3, "CD79A": 5}]}
_CSR_EXAMPLE: JsonDict = {
    "RNA": {
        "features": ["ENSG00000167286", "ENSG00000156738"],
        "indptr": [0, 1, 3],
        "indices": [0, 0, 1],
        "data": [4, 1, 3],
    }
}


class Question(Request):
    """What every question may say."""

    adapter: Name = Field(default="", description="An adapter from GET /v1/models that is to answer; empty is none.")


class EmbedOptions(Request):
    """How embeddings are written."""

    dtype: Literal["float32", "float16"] = "float32"
    encoding: Encoding = Field(
        default="float", description="`float`: nested JSON numbers; `base64`: little-endian bytes."
    )
    normalize: bool = Field(default=False, description="Scale each embedding to length 1.")
    min_coverage: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Refuse when a smaller share of the counts of a measurement is known to the model.",
    )
    feature_embeddings: dict[Name, Names] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="Measurement to ids or symbols of features whose own vectors are wanted too: what the model takes "
        "them for, whatever the cells.",
        examples=[{"RNA": ["CD3D", "ENSG00000156738"]}],
    )


class EmbedRequest(Question):
    """Cells to embed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"counts": _CELLS_EXAMPLE},
                {"counts": _CSR_EXAMPLE, "options": {"encoding": "base64", "normalize": True}},
            ]
        }
    )

    counts: Counts
    prompts: Prompts = Field(default_factory=dict)
    options: EmbedOptions = EmbedOptions()


class PerturbOptions(Request):
    """How effects are written."""

    top: int = Field(
        default=20, ge=0, le=1_000, description="Features with the largest change to list, per measurement."
    )
    vectors: bool = Field(default=False, description="Also give control, perturbed and delta of every feature.")
    level: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="Of a head's intervals: the share of all features' effects that they hold, on average over "
        "perturbations (or what the head held out, see GET /v1/models) that are like those it learned from.",
    )
    encoding: Encoding = Field(default="float", description="Form of the vectors.")
    min_coverage: float | None = Field(default=None, ge=0, le=1)


class PerturbRequest(Question):
    """Control cells and the perturbations whose effect on them is asked."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"counts": _CELLS_EXAMPLE, "perturbations": ["STAT1", ["IRF1", "STAT1"]]},
                {"counts": _CELLS_EXAMPLE, "perturbations": ["STAT1"], "head": "screen", "options": {"level": 0.8}},
            ],
        }
    )

    counts: Counts
    prompts: Prompts = Field(default_factory=dict)
    perturbations: list[Name | Names] = Field(
        min_length=1,
        description="Targets from GET /v1/perturbations; a list of targets is one combined perturbation. A head also "
        "takes targets that were never hit.",
    )
    head: Name = Field(
        default="", description="A head from GET /v1/models that is to answer, with intervals; empty is the model."
    )
    context: dict[Name, Name] = Field(
        default_factory=dict,
        max_length=16,
        description="What the head takes for the cells' context, by column, where it learned from several.",
        examples=[{"cell_type": "B cell"}],
    )
    options: PerturbOptions = PerturbOptions()


class AnnotateOptions(Request):
    """How cell types are told."""

    top: int = Field(default=3, ge=1, le=100, description="Types to list for each cell, likeliest first.")
    cover: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="`covering` names the nearest Cell Ontology type above the likeliest types that together have this "
        "probability.",
    )
    min_probability: float = Field(
        default=0.0, ge=0, le=1, description="A cell whose likeliest type is less likely is called `unknown`."
    )
    min_novelty_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="A cell whose `novelty_p` is smaller is called `unknown`; so is this share of known kinds.",
    )
    min_coverage: float | None = Field(default=None, ge=0, le=1)


class AnnotateRequest(Question):
    """Cells whose types are asked."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"counts": _CELLS_EXAMPLE, "options": {"top": 2, "min_probability": 0.5}}]}
    )

    counts: Counts
    prompts: Prompts = Field(default_factory=dict)
    options: AnnotateOptions = AnnotateOptions()


class TranslateOptions(Request):
    """How predicted values are written."""

    features: Names | None = Field(
        default=None, description="Ids or symbols of the features that are wanted; all when left out.", min_length=1
    )
    encoding: Encoding = Field(default="float", description="Form of the values.")
    min_coverage: float | None = Field(default=None, ge=0, le=1)


class TranslateRequest(Question):
    """Cells of which another measurement is predicted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"counts": _CELLS_EXAMPLE, "measurement": "protein", "options": {"features": ["CD3", "CD19"]}}]
        }
    )

    counts: Counts
    measurement: Name = Field(description="What is predicted; what was measured of it already is read too.")
    prompts: Prompts = Field(default_factory=dict)
    options: TranslateOptions = TranslateOptions()


class ForecastRequest(Question):
    """Cells whose future is asked."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"counts": _CELLS_EXAMPLE, "elapsed": 2.0}]})

    counts: Counts
    elapsed: float = Field(gt=0, le=1e9, description="How much later, in the unit of the model's `time`.")
    prompts: Prompts = Field(default_factory=dict)
    options: PerturbOptions = PerturbOptions()


class GenerateRequest(Question):
    """What is said of cells that are drawn from the model."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompts": {"tissue": "blood"}, "cells": 5, "measurement": "RNA"}]}
    )

    prompts: Prompts = Field(default_factory=dict)
    cells: int = Field(default=1, ge=1, description="How many to draw.")
    measurement: Name = Field(default="RNA", description="A measurement of counts.")
    depth: float = Field(default=5_000.0, gt=0, le=1e6, description="Counts of a cell, on average.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="The same seed draws the same cells.")


class Provenance(Reply):
    """Which model answered, and which data it learned from."""

    model_sha256: str
    vocabulary_hash: str
    global_step: int
    snapshot_name: str
    snapshot_id: str
    commit_id: str
    adapter: str | None = Field(default=None, description="The adapter that answered.")
    adapter_sha256: str | None = None
    head: str | None = Field(default=None, description="The head that answered.")
    head_sha256: str | None = None


class Coverage(Reply):
    """How much of one measurement of the request the model could use."""

    features: int = Field(description="Features named in the request.")
    mapped: int = Field(description="Of these, features that the model knows.")
    share_of_counts: float = Field(
        description="Share of all counts that belongs to mapped features; of levels, share of all values."
    )
    unmapped: list[str] = Field(description="The first 20 features that the model does not know.")
    ambiguous: list[str] = Field(
        description="The first 20 symbols that several features carry, where no organism decides."
    )


class Tensor(Reply):
    """An array as base64 of its little-endian bytes, last axis fastest."""

    dtype: str
    shape: list[int]
    base64: str


class FeatureEmbeddings(Reply):
    """What the model takes features for, in the order of the request."""

    features: list[str] = Field(description="Their ids.")
    embeddings: list[list[float]] | Tensor | None = Field(
        default=None, description="One vector for each; in an npz it is the array `feature_embeddings/MEASUREMENT`."
    )


class EmbedReply(Reply):
    """One embedding per cell, in the order of the request."""

    embeddings: list[list[float]] | Tensor
    feature_embeddings: dict[str, FeatureEmbeddings] | None = Field(
        default=None, description="By measurement, where they were asked for."
    )
    coverage: dict[str, Coverage]
    warnings: list[str]
    provenance: Provenance


class FeatureEffect(Reply):
    """Predicted mean expression, log1p of counts per 10,000, of one feature without and with the perturbation.

    The model's is the mean of the cells' logs; a head's the log of their pooled counts, and its ``perturbed`` that plus
    ``delta``, which may come out below 0 where the cells have little of a feature.
    """

    feature_id: str
    feature_name: str
    control: float
    perturbed: float
    delta: float
    low: float | None = Field(default=None, description="Where the interval of `delta` begins, of a head.")
    high: float | None = Field(default=None, description="Where it ends.")


class MeasurementEffect(Reply):
    """Effect on one measurement, averaged over the cells; vectors follow ``features`` of the reply."""

    top: list[FeatureEffect]
    control: list[float] | Tensor | None = None
    perturbed: list[float] | Tensor | None = None
    delta: list[float] | Tensor | None = None
    low: list[float] | Tensor | None = None
    high: list[float] | Tensor | None = None


class Effect(Reply):
    """What one perturbation is predicted to do."""

    perturbation: str = Field(description="Its targets, each once, in order of the alphabet.")
    asked: str = Field(description="Its targets as the request named them, those of a list joined by `+`.")
    effects: dict[str, MeasurementEffect]


class PerturbReply(Reply):
    """One effect per perturbation, in the order of the request."""

    perturbations: list[Effect]
    features: dict[str, list[str]] = Field(description="Feature ids behind the vectors; empty without `vectors`.")
    cells: int
    coverage: dict[str, Coverage]
    warnings: list[str]
    provenance: Provenance


class TypeProbability(Reply):
    """One type that a cell may be."""

    cell_type: str
    cell_type_id: str = Field(description="Its term in the Cell Ontology; empty where it has none.")
    probability: float


class Annotation(Reply):
    """What one cell is."""

    cell_type: str = Field(description="The likeliest type, or `unknown`.")
    types: list[TypeProbability]
    covering: str = Field(description="The ontology's nearest type above those that are likely; empty if none is.")
    covering_id: str
    novelty_p: float | None = Field(
        default=None,
        description="How likely a cell of a known kind is to be at least as far from the training cells in the model's "
        "space; small for cells of kinds that it never saw. Left out where the checkpoint cannot tell.",
    )


class AnnotateReply(Reply):
    """One annotation per cell, in the order of the request."""

    cells: list[Annotation]
    coverage: dict[str, Coverage]
    warnings: list[str]
    provenance: Provenance


class TranslateReply(Reply):
    """Expected values, [cells, features]."""

    measurement: str
    unit: str
    features: list[str] = Field(description="Feature ids of the columns.")
    values: list[list[float]] | Tensor
    coverage: dict[str, Coverage]
    warnings: list[str]
    provenance: Provenance


class ForecastReply(Reply):
    """What becomes of the cells: `control` is now, `perturbed` is later."""

    effects: dict[str, MeasurementEffect]
    features: dict[str, list[str]] = Field(description="Feature ids behind the vectors; empty without `vectors`.")
    cells: int
    coverage: dict[str, Coverage]
    warnings: list[str]
    provenance: Provenance


class DrawnCounts(Reply):
    """Counts as a compressed sparse row matrix, as requests have them."""

    features: list[str] = Field(description="Ids of those that were drawn in some cell; none where nothing was.")
    indptr: list[int]
    indices: list[int]
    data: list[float]


class GenerateReply(Reply):
    """Drawn counts."""

    measurement: str
    counts: DrawnCounts
    provenance: Provenance


class SwapReport(Reply):
    """What came of the last time that another checkpoint was to answer."""

    when: str
    model_sha256: str = Field(description="The one that answers since; empty where nothing changed.")
    error: str = Field(description="Why nothing changed.")


class HeadReport(Reply):
    """A transition head that answers about perturbations here."""

    sha256: str
    measurement: str
    context: list[str] = Field(description="Columns that make a context.")
    contexts: list[str] = Field(
        description="Contexts that it learned from, columns joined by ` | `, bars within a value behind a backslash."
    )
    held_out: str = Field(description="What its intervals hold for when it is new: target, perturbation or a column.")
    perturbed: int = Field(description="Targets that it saw hit.")
    baseline: str = Field(description="The baseline that it stands on.")
    gate: float = Field(description="Weight of what its flow adds; 0 where that did not help on held-out groups.")


class ModelCard(Reply):
    """A model that answers here."""

    id: str
    ready: bool
    provenance: Provenance
    created: str
    measurements: dict[str, int] = Field(description="Measurement to the number of its features.")
    levels: list[str] = Field(
        default_factory=list, description="Those of them whose values are levels (intensities, fractions), not counts."
    )
    embedding_size: int
    prompts: list[str] = Field(description="What may be said of cells; see GET /v1/prompts.")
    limits: dict[str, int | float] = Field(
        description="What one request may hold: `cells`, `nonzeros` (counts), `features`, `perturbations`, "
        "`body_bytes`, and `values` of a reply; other settings beside them."
    )
    figures: dict[str, int | float] = Field(default_factory=dict, description="What its training measured.")
    swap: SwapReport | None = None
    adapters: dict[str, str] = Field(default_factory=dict, description="Adapter to the SHA-256 of its weights.")
    adapters_refused: dict[str, str] = Field(default_factory=dict, description="Adapter to why it cannot be used.")
    heads: dict[str, HeadReport] = Field(default_factory=dict)
    heads_refused: dict[str, str] = Field(default_factory=dict, description="Head to why it cannot be used.")


class ModelsReply(Reply):
    """All models of this server."""

    models: list[ModelCard]


class Feature(Reply):
    """One feature of the model's vocabulary."""

    feature_id: str
    feature_name: str
    organism: str


class FeaturesReply(Reply):
    """A page of one measurement's features in vocabulary order."""

    measurement: str
    total: int
    offset: int
    features: list[Feature]
    vocabulary_hash: str


class PerturbationsReply(Reply):
    """Perturbations that the model has seen."""

    perturbations: list[str]
    vocabulary_hash: str


class PromptsReply(Reply):
    """Prompt fields and the values that the model has seen."""

    prompts: dict[str, list[str]]
    numbers: list[str] = Field(description="Prompt fields that are said in numbers.")
    units: dict[str, list[str]] = Field(
        description="The units in which the cells that the model was trained on give numbers; what is not listed is "
        "not known."
    )
    vocabulary_hash: str


class Health(Reply):
    """The server's state."""

    status: Literal["live", "ready"]


class FieldProblem(Reply):
    """One field that is wrong."""

    field: str
    message: str


class Problem(Reply):
    """Why a request was not answered (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []
    retry_after_s: int | None = None
