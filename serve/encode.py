"""This module writes the model's answers as replies, with provenance and coverage.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features of a measurement
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.decode import Decoded, Features
from serve.messages import (
    Effect,
    EmbedOptions,
    EmbedReply,
    Encoding,
    FeatureEffect,
    MeasurementEffect,
    PerturbOptions,
    PerturbReply,
    Provenance,
    Tensor,
)
from serve.model import Description, Shift


def provenance(description: Description) -> Provenance:
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
    )


def tensor(values: NDArray[np.floating]) -> Tensor:
    """Write an array as base64."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return Tensor(dtype=values.dtype.name, shape=list(values.shape), base64=base64.b64encode(little.tobytes()).decode())


def unit_length(embedding_CD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1; a row of zeros stays."""
    length_C1 = np.linalg.norm(embedding_CD, axis=1, keepdims=True)
    return np.divide(embedding_CD, np.where(length_C1 > 0, length_C1, 1), dtype=np.float32)


def embed_reply(
    embedding_CD: NDArray[np.float32], options: EmbedOptions, decoded: Decoded, description: Description
) -> EmbedReply:
    """Write embeddings in the form that the request asks for."""
    values = (unit_length(embedding_CD) if options.normalize else embedding_CD).astype(options.dtype)
    return EmbedReply.model_construct(
        embeddings=tensor(values) if options.encoding == "base64" else values.tolist(),
        coverage=decoded.coverage,
        warnings=decoded.warnings,
        provenance=provenance(description),
    )


def perturb_reply(
    asked: Sequence[Sequence[str]],
    shifts: Sequence[dict[str, Shift]],
    options: PerturbOptions,
    decoded: Decoded,
    description: Description,
) -> PerturbReply:
    """Write the effect of each perturbation: the features that change most, and on request all vectors."""
    effects = [
        Effect(
            perturbation="+".join(targets),
            effects={
                name: _measurement_effect(shift, description.vocabulary[name], options) for name, shift in part.items()
            },
        )
        for targets, part in zip(asked, shifts, strict=True)
    ]
    names = {name: description.vocabulary[name].feature_id for part in shifts for name in part}
    return PerturbReply.model_construct(
        perturbations=effects,
        features=names if options.vectors else {},
        cells=decoded.cells.n_cells,
        coverage=decoded.coverage,
        warnings=decoded.warnings,
        provenance=provenance(description),
    )


def _measurement_effect(shift: Shift, features: Features, options: PerturbOptions) -> MeasurementEffect:
    strongest = np.argsort(-np.abs(shift.delta_G), kind="stable")[: options.top]
    top = [
        FeatureEffect(
            feature_id=features.feature_id[position],
            feature_name=features.feature_name[position],
            control=float(shift.control_G[position]),
            perturbed=float(shift.perturbed_G[position]),
            delta=float(shift.delta_G[position]),
        )
        for position in strongest
    ]
    if not options.vectors:
        return MeasurementEffect(top=top)
    control, perturbed, delta = (
        _vector(vector_G, options.encoding) for vector_G in (shift.control_G, shift.perturbed_G, shift.delta_G)
    )
    return MeasurementEffect.model_construct(top=top, control=control, perturbed=perturbed, delta=delta)


def _vector(vector_G: NDArray[np.float32], encoding: Encoding) -> list[float] | Tensor:
    return tensor(vector_G) if encoding == "base64" else vector_G.tolist()
