"""Adapters: they begin as nothing, reach every layer they are named for, leave the trunk alone, and know their base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import random as random_counts
from small_checkpoint import write_checkpoint

from store.errors import InputRefused
from train.adapter import TARGETS, AdapterSettings, adapted, adapter_weights, load_adapter, merged, save_adapter
from train.evaluation.scratch import ScratchSettings, objective_of
from train.predictor import Predictor

SIZES = AdapterSettings(rank=2, alpha=4)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.load(write_checkpoint(tmp_path_factory.mktemp("base") / "checkpoint"))


def cells(predictor: Predictor, n_cells: int = 6):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    sizes = {name: len(part.feature_id) for name, part in predictor.vocabulary.items()}
    drawn = {
        name: random_counts(n_cells, size, 0.5, "csr", rng=rng, data_rvs=lambda size: rng.integers(1, 9, size))
        for name, size in sizes.items()
    }
    found = predictor.cells({name: part.astype(np.float32) for name, part in drawn.items()})
    found.panel[:] = 0
    return found


def answer(predictor: Predictor, model) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    kept, predictor.model = predictor.model, model
    try:
        return {name: predictor.shares(cells(predictor), name) for name in predictor.vocabulary}
    finally:
        predictor.model = kept


def moved(predictor: Predictor, seed: int = 1):  # type: ignore[no-untyped-def]
    model = adapted(predictor.model, SIZES, seed)
    with torch.no_grad():
        for weight in adapter_weights(model).values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def test_an_adapter_begins_as_nothing(predictor: Predictor) -> None:
    before, after = answer(predictor, predictor.model), answer(predictor, adapted(predictor.model, SIZES))
    for name, share in before.items():
        np.testing.assert_array_equal(after[name], share)


def test_each_target_gets_gradient_and_the_trunk_stays_as_it_is(predictor: Predictor) -> None:
    model = moved(predictor)  # the second factor is zero at the start: the first would get no gradient
    trunk = {name: weight.clone() for name, weight in predictor.model.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    objective = objective_of(model, ScratchSettings(), seed=0)
    loss, *_ = objective(model, model, cells(predictor), 0)
    torch.autograd.backward(loss.total)
    learning = dict(model.named_parameters())
    for target in TARGETS:
        hit = [name for name in learning if f"{target}.lora_" in name]
        assert len(hit) >= 2, target
        assert all(learning[name].grad.abs().sum() > 0 for name in hit), target
    assert all(weight.grad is None for name, weight in learning.items() if "lora_" not in name)
    before = {name: weight.clone() for name, weight in adapter_weights(model).items()}
    optimizer.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items())
    for name, weight in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, trunk[name.replace(".base_layer.", ".")]), name


def test_saved_loaded_and_merged_adapters_answer_alike(predictor: Predictor, tmp_path: Path) -> None:
    model = moved(predictor)
    expected = answer(predictor, model)
    assert any(
        np.abs(answer(predictor, predictor.model)[name] - share).max() > 1e-4 for name, share in expected.items()
    )
    folder = save_adapter(tmp_path / "adapter", model, SIZES, predictor.manifest)
    again = answer(predictor, load_adapter(folder, predictor.model, predictor.manifest))
    plain = answer(predictor, merged(model))
    for name, share in expected.items():
        np.testing.assert_array_equal(again[name], share)
        np.testing.assert_allclose(plain[name], share, rtol=1e-4, atol=1e-7)


def test_an_adapter_is_refused_by_another_checkpoint_and_when_it_is_damaged(
    predictor: Predictor, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", moved(predictor), SIZES, predictor.manifest)
    with pytest.raises(InputRefused, match="this one has ffffffffffff"):
        load_adapter(folder, predictor.model, predictor.manifest | {"model_sha256": "f" * 64})
    with pytest.raises(InputRefused, match="not an adapter; a checkpoint is loaded by itself"):
        load_adapter(write_checkpoint(tmp_path / "checkpoint"), predictor.model, predictor.manifest)
    (folder / "adapter.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(InputRefused, match="SHA-256 differs"):
        load_adapter(folder, predictor.model, predictor.manifest)
