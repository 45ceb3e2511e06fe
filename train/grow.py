"""This module lets a checkpoint's vocabulary grow: features that it never saw get vectors.

A new feature inherits what a known one is (a protein its gene), or gets one of the shared vectors that training kept
for unknown features, by the hash of its id. Known features keep their weights; only their numbers move.

Shape letters used in this module:
    F  features of all measurements      G  features of one measurement
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from store.errors import InputRefused
from train.checkpoint import Checkpoint, Vocabulary
from train.model import CellModel


def grow(
    loaded: Checkpoint, more: Mapping[str, Sequence[tuple[str, str, str]]], inherit: Mapping[str, str] | None = None
) -> Checkpoint:
    """Return a checkpoint that also knows other features; those that it knows already stay as they are.

    Whole-cell decoders begin at a negligible rate of a new feature: train on before asking for it.

    Args:
        loaded: Stays as it is.
        more: Measurement to id, name and organism of features; id and organism together say which one it is.
        inherit: A new feature's id to the id of a known one, of any measurement. Where several have that id, it is the
            one of the same organism, and of these that of the same measurement.

    Raises:
        InputRefused: A measurement that the model does not have, an heir that is no feature, or one of what nobody
            knows, or of what may be one of several.
    """
    old, inherit = loaded.model.config, dict(inherit or {})
    vocabulary: dict[str, Vocabulary] = {}
    n_features: dict[str, int] = {}
    place = _places(loaded)
    for name in set(more) - set(loaded.vocabulary):
        raise InputRefused(f"no measurement {name!r} in this model; it has {', '.join(loaded.vocabulary)}")
    for name in set(more) & set(old.levels):
        raise InputRefused(
            f"{name} holds levels: nobody knows the mean of a feature that was not in training; train again"
        )
    named = {feature for features in more.values() for feature, _, _ in features}
    for heir, of in inherit.items():
        if heir not in named and heir not in place:
            raise InputRefused(f"inherit: {heir!r} is none of the new features, and the model does not know it either")
        if of not in place:
            raise InputRefused(f"{heir!r} cannot inherit from {of!r}: the model does not know it")
    source: list[int] = [0]
    for name, part in loaded.vocabulary.items():
        known = set(zip(part.feature_id, part.organism, strict=True))
        fresh = {(feature, organism): called for feature, called, organism in more.get(name, ())}
        fresh = {key: called for key, called in fresh.items() if key not in known}
        vocabulary[name] = Vocabulary(
            [*part.feature_id, *(feature for feature, _ in fresh)],
            [*part.feature_name, *fresh.values()],
            [*part.organism, *(organism for _, organism in fresh)],
        )
        n_features[name] = len(vocabulary[name].feature_id)
        source += [old.offsets[name] + number for number in range(len(part.feature_id))]
        source += [
            _inherited(place[inherit[feature]], inherit[feature], feature, organism, name) if feature in inherit else -1
            for feature, organism in fresh
        ]
    source_F = torch.tensor(source)
    degree_F, set_E = _memberships(loaded.model, source_F)
    model = CellModel(replace(old, n_features=n_features, n_memberships=len(set_E)))
    ids = ["", *(feature for part in vocabulary.values() for feature in part.feature_id)]
    model.load_state_dict(_state(loaded.model, model, source_F, ids, degree_F, set_E))
    return replace(loaded, model=model.eval(), vocabulary=vocabulary)


def _places(loaded: Checkpoint) -> dict[str, dict[tuple[str, str], int]]:
    """Return each known id's features: their organism and measurement, and their number among all features."""
    place: dict[str, dict[tuple[str, str], int]] = {}
    for name, part in loaded.vocabulary.items():
        for number, (feature, organism) in enumerate(zip(part.feature_id, part.organism, strict=True)):
            place.setdefault(feature, {})[organism, name] = loaded.model.config.offsets[name] + number
    return place


def _inherited(known: Mapping[tuple[str, str], int], of: str, heir: str, organism: str, measurement: str) -> int:
    """Return which of the features with an id an heir inherits from: its own organism's, its own measurement's."""
    nearest = {key: number for key, number in known.items() if key[0] == organism} or known
    nearest = {key: number for key, number in nearest.items() if key[1] == measurement} or nearest
    if len(nearest) > 1:
        these = ", ".join(f"{name} of {whose or 'no organism'}" for whose, name in sorted(known))
        raise InputRefused(
            f"{heir!r} of {organism or 'no organism'} cannot inherit from {of!r}, which is {these}; none or several "
            "are of its organism"
        )
    return next(iter(nearest.values()))


def _memberships(model: CellModel, source_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return in how many sets each feature is, and in which."""
    border_F, identity = model.identity.border_F, model.identity
    sets = [
        identity.set_E[border_F[number] : border_F[number + 1]] if number >= 0 else identity.set_E[:0]
        for number in source_F.tolist()
    ]
    return torch.tensor([len(part) for part in sets]), torch.cat(sets)


def _state(
    old: CellModel, new: CellModel, source_F: Tensor, ids: Sequence[str], degree_F: Tensor, set_E: Tensor
) -> dict[str, Tensor]:
    """Return the weights of the grown model."""
    state, fresh_F = dict(old.state_dict()), source_F < 0
    rows = old.identity.shared.num_embeddings
    bucket_F = torch.tensor([int.from_bytes(hashlib.sha256(one.encode()).digest()[:8]) % rows for one in ids])
    shared_FD = state["identity.shared.weight"][bucket_F]
    own_FD = state["identity.own.weight"][source_F.clamp(min=0)]
    state["identity.own.weight"] = torch.where(fresh_F[:, None], shared_FD, own_FD)
    state["identity.set_E"] = set_E
    state["identity.border_F"] = torch.cat([degree_F.new_zeros(1), torch.cumsum(degree_F, 0)])
    for name in [name for name in state if name.startswith("identity.frozen_")]:
        state[name] = state[name][source_F.clamp(min=0)] * ~fresh_F[:, None]
    for name in [f"identity.{part}" for part in ("chromosome_F", "base_F", "bases_FW")]:
        if name in state:
            state[name] = state[name][torch.where(fresh_F, 0, source_F)]  # as little is known as of padding
    for name in [name for name in state if name.startswith("levels.")]:
        kept_F = state[name][source_F.clamp(min=0)]
        state[name] = torch.where(fresh_F, torch.full_like(kept_F, name == "levels.scale_F"), kept_F)
    for name, size in old.config.n_features.items():
        first = new.config.offsets[name]
        number_G = source_F[first : first + new.config.n_features[name]] - old.config.offsets[name]
        within_G = (number_G >= 0) & (number_G < size)  # an heir of another measurement has no rate here
        for part, value in ((f"decoders.{name}.{key}", state[f"decoders.{name}.{key}"]) for key in _parts(old, name)):
            empty = float(value.min()) - 5 if part.endswith("bias") else 1.0 if part.endswith("dispersion") else 0.0
            kept = value[number_G.clamp(0, size - 1)]
            state[part] = torch.where(within_G.view(-1, *[1] * (value.ndim - 1)), kept, torch.full_like(kept, empty))
    return state


def _parts(model: CellModel, name: str) -> list[str]:
    return list(model.decoders[name].state_dict())
