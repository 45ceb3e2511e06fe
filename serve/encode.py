"""This module writes the model's answers as replies, with provenance and coverage.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features of a measurement      Y  cell types      X  wanted features
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from serve.decode import Decoded, Features
from serve.errors import FieldRefused
from serve.messages import (
    AnnotateOptions,
    AnnotateReply,
    Annotation,
    DrawnCounts,
    Effect,
    EmbedOptions,
    EmbedReply,
    Encoding,
    FeatureEffect,
    FeatureEmbeddings,
    ForecastReply,
    GenerateReply,
    MeasurementEffect,
    PerturbOptions,
    PerturbReply,
    Provenance,
    Tensor,
    TranslateOptions,
    TranslateReply,
    TypeProbability,
)
from serve.model import Description, Shift, Shifts, Translate
from train.ontology import covering_type, type_id

UNKNOWN = "unknown"


def provenance(description: Description, head: str = "") -> Provenance:
    """Read from a checkpoint's manifest what every reply says about its origin."""
    manifest = description.manifest
    snapshot = manifest.get("snapshot", {})
    return Provenance(
        model_sha256=str(manifest["model_sha256"]),
        vocabulary_hash=str(manifest["vocabulary_hash"]),
        global_step=int(manifest.get("global_step", 0)),
        snapshot_name=str(snapshot.get("name", "")),
        snapshot_id=str(snapshot.get("id", "")),
        commit_id=str(snapshot.get("commit_id", "")),
        adapter=description.adapter or None,
        adapter_sha256=description.adapters.get(description.adapter),
        head=head or None,
        head_sha256=description.heads[head].sha256 if head else None,
    )


def tensor(values: NDArray[Any]) -> Tensor:
    """Write an array as base64."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return Tensor(dtype=values.dtype.name, shape=list(values.shape), base64=base64.b64encode(little.tobytes()).decode())


def unit_length(embedding_CD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1; a row of zeros stays."""
    exact_CD = embedding_CD.astype(np.float64)  # squares of large numbers leave float32
    length_C1 = np.linalg.norm(exact_CD, axis=1, keepdims=True)
    return (exact_CD / np.where(length_C1 > 0, length_C1, 1)).astype(np.float32)


def embed_reply(
    embedding_CD: NDArray[np.float32],
    features: Mapping[str, tuple[Sequence[int], NDArray[np.float32]]] | None,
    options: EmbedOptions,
    decoded: Decoded,
    description: Description,
) -> EmbedReply:
    """Write embeddings in the form that the request asks for.

    Args:
        embedding_CD: Of cells.
        features: Measurement to the columns of features and their vectors_XD, where they were asked for.
        options: The form.
        decoded: The cells.
        description: The checkpoint.
    """

    def written(values_XD: NDArray[np.float32]) -> Tensor | list[list[float]]:
        with np.errstate(over="ignore"):
            values = (unit_length(values_XD) if options.normalize else values_XD).astype(options.dtype)
        if not np.isfinite(values).all():
            raise FieldRefused("options.dtype", f"a vector does not fit {options.dtype}; normalize, or ask for float32")
        return tensor(values) if options.encoding == "base64" else values.tolist()

    named = {
        name: FeatureEmbeddings.model_construct(
            features=[description.vocabulary[name].feature_id[column] for column in columns],
            embeddings=written(vector_XD),
        )
        for name, (columns, vector_XD) in (features or {}).items()
    }
    return EmbedReply.model_construct(
        embeddings=written(embedding_CD),
        feature_embeddings=named or None,
        coverage=decoded.coverage,
        warnings=decoded.warnings,
        provenance=provenance(description),
    )


def as_named(perturbation: str | list[str]) -> str:
    """Write a perturbation as a request named it."""
    return perturbation if isinstance(perturbation, str) else "+".join(perturbation)


def perturb_reply(
    asked: Sequence[Sequence[str]],
    named: Sequence[str | list[str]],
    shifts: Sequence[dict[str, Shift]],
    options: PerturbOptions,
    decoded: Decoded,
    description: Description,
    head: str = "",
) -> PerturbReply:
    """Write the effect of each perturbation: the features that change most, and on request all vectors."""
    effects = [
        Effect(
            perturbation="+".join(targets),
            asked=as_named(name),
            effects={
                name: _measurement_effect(shift, description.vocabulary[name], options) for name, shift in part.items()
            },
        )
        for targets, name, part in zip(asked, named, shifts, strict=True)
    ]
    names = {
        name: _in_places(shift, description.vocabulary[name].feature_id)
        for part in shifts
        for name, shift in part.items()
    }
    return PerturbReply.model_construct(
        perturbations=effects,
        features=names if options.vectors else {},
        cells=decoded.cells.n_cells,
        coverage=decoded.coverage,
        warnings=decoded.warnings,
        provenance=provenance(description, head),
    )


NO_NOVELTY = "min_novelty_p has no effect: this model keeps no cells that say what is new (an adapter, few test cells)"


def annotate_reply(
    told: NDArray[np.float32], options: AnnotateOptions, decoded: Decoded, description: Description
) -> AnnotateReply:
    """Write which types cells are, the type above those that are likely, and how likely a known kind is."""
    return AnnotateReply.model_construct(
        cells=what_each_is(told, options, description),
        coverage=decoded.coverage,
        warnings=[*decoded.warnings, NO_NOVELTY] if unheeded(told, options) else decoded.warnings,
        provenance=provenance(description),
    )


def unheeded(told: NDArray[np.float32], options: AnnotateOptions) -> bool:
    """Say whether novelty is asked to decide where the model does not tell it."""
    return options.min_novelty_p > 0 and len(told) > 0 and bool(np.isnan(told[:, 0]).all())


def what_each_is(told: NDArray[np.float32], options: AnnotateOptions, description: Description) -> list[Annotation]:
    """Write what each cell is."""
    novelty_C, probability_CY = told[:, 0], told[:, 1:]
    names = description.prompts["cell_type"]
    order_CY = np.argsort(-probability_CY, axis=1, kind="stable")
    sorted_CY = np.take_along_axis(probability_CY, order_CY, axis=1)
    n_likely_C = (np.cumsum(sorted_CY, axis=1) < options.cover).sum(axis=1) + 1
    top = min(options.top, len(names) - 1)  # the first is "not said", which no cell is
    cells = []
    for order_Y, sorted_Y, n_likely, novelty in zip(order_CY, sorted_CY, n_likely_C, novelty_C, strict=True):
        types = [
            TypeProbability(cell_type=names[code], cell_type_id=type_id(names[code]), probability=float(value))
            for code, value in zip(order_Y[:top], sorted_Y[:top], strict=True)
        ]
        known = types[0].probability >= options.min_probability and not novelty < options.min_novelty_p
        above = covering_type(frozenset(names[code] for code in order_Y[:n_likely]))
        cells.append(
            Annotation(
                cell_type=types[0].cell_type if known else UNKNOWN,
                types=types,
                covering=above,
                covering_id=type_id(above),
                novelty_p=None if np.isnan(novelty) else float(novelty),
            )
        )
    return cells


def translate_reply(
    values_CX: NDArray[np.float32], asked: Translate, options: TranslateOptions, decoded: Decoded, about: Description
) -> TranslateReply:
    """Write the expected values of a measurement."""
    ids = about.vocabulary[asked.measurement].feature_id
    return TranslateReply.model_construct(
        measurement=asked.measurement,
        unit=about.units[asked.measurement],
        features=ids if asked.columns is None else [ids[column] for column in asked.columns],
        values=tensor(values_CX) if options.encoding == "base64" else values_CX.tolist(),
        coverage=decoded.coverage,
        warnings=decoded.warnings,
        provenance=provenance(about),
    )


def forecast_reply(
    shifts: Shifts, options: PerturbOptions, decoded: Decoded, description: Description
) -> ForecastReply:
    """Write what becomes of cells."""
    vocabulary = description.vocabulary
    return ForecastReply.model_construct(
        effects={name: _measurement_effect(shift, vocabulary[name], options) for name, shift in shifts.items()},
        features={name: vocabulary[name].feature_id for name in shifts} if options.vectors else {},
        cells=decoded.cells.n_cells,
        coverage=decoded.coverage,
        warnings=decoded.warnings,
        provenance=provenance(description),
    )


def generate_reply(counts_CG: csr_matrix, measurement: str, description: Description) -> GenerateReply:
    """Write drawn counts, with the features that have any."""
    used, indices = np.unique(counts_CG.indices, return_inverse=True)
    ids = description.vocabulary[measurement].feature_id
    counts = DrawnCounts.model_construct(
        features=[ids[column] for column in used],
        indptr=counts_CG.indptr.tolist(),
        indices=indices.tolist(),
        data=counts_CG.data.tolist(),
    )
    return GenerateReply.model_construct(measurement=measurement, counts=counts, provenance=provenance(description))


def _measurement_effect(shift: Shift, features: Features, options: PerturbOptions) -> MeasurementEffect:
    top = feature_effects(shift, features, np.argsort(-np.abs(shift.delta_G), kind="stable")[: options.top])
    if not options.vectors:
        return MeasurementEffect(top=top)
    vectors = {
        "control": shift.control_G,
        "perturbed": shift.perturbed_G,
        "delta": shift.delta_G,
        "low": shift.low_G,
        "high": shift.high_G,
    }
    written = {name: _vector(part_G, options.encoding) for name, part_G in vectors.items() if part_G is not None}
    return MeasurementEffect.model_construct(None, top=top, **written)


def _in_places(shift: Shift, values: list[str]) -> list[str]:
    return values if shift.positions is None else [values[position] for position in shift.positions]


def feature_effects(shift: Shift, features: Features, positions: NDArray[np.int64]) -> list[FeatureEffect]:
    """Write what happens to some features, in the order given."""
    place = shift.positions
    return [
        FeatureEffect(
            feature_id=features.feature_id[position if place is None else place[position]],
            feature_name=features.feature_name[position if place is None else place[position]],
            control=float(shift.control_G[position]),
            perturbed=float(shift.perturbed_G[position]),
            delta=float(shift.delta_G[position]),
            low=None if shift.low_G is None else float(shift.low_G[position]),
            high=None if shift.high_G is None else float(shift.high_G[position]),
        )
        for position in positions
    ]


def _vector(vector_G: NDArray[np.float32], encoding: Encoding) -> list[float] | Tensor:
    return tensor(vector_G) if encoding == "base64" else vector_G.tolist()
