"""Adapters: they begin as nothing, reach every layer they are named for, leave the trunk alone, and know their base.

Several stand on one base, whose weights are in memory once.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import random as random_counts
from small_checkpoint import write_checkpoint

from store.errors import InputRefused, UsageError
from train.adapter import (
    TARGETS,
    AdapterSettings,
    adapted,
    adapter_weights,
    attach,
    attached,
    chosen,
    load_adapter,
    merged,
    save_adapter,
    share_of_weights,
    use,
)
from train.cells import PROMPTS
from train.checkpoint import write_manifest
from train.config import ModelConfig
from train.evaluation.scratch import ScratchSettings, objective_of
from train.model import CellModel
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


def moved(predictor: Predictor, seed: int = 1, sizes: AdapterSettings = SIZES):  # type: ignore[no-untyped-def]
    model = adapted(predictor.model, sizes, seed)
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


WIDER = AdapterSettings(rank=3, alpha=3)


@pytest.fixture(scope="module")
def saved(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of other sizes, "first" and "RNA": a name that a layer has too."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "first": save_adapter(folder / "first", moved(predictor, 1), SIZES, predictor.manifest),
        "RNA": save_adapter(folder / "RNA", moved(predictor, 2, WIDER), WIDER, predictor.manifest),
    }


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(share, second[name]) for name, share in first.items())


def test_adapters_on_one_base_are_chosen_by_name_and_none_answers_bit_for_bit_as_the_base(
    predictor: Predictor, saved: dict[str, Path]
) -> None:
    base = answer(predictor, predictor.model)
    alone = {
        name: answer(predictor, load_adapter(path, predictor.model, predictor.manifest)) for name, path in saved.items()
    }
    assert not same(alone["first"], alone["RNA"])
    model = attach(predictor.model, saved, predictor.manifest)
    assert (attached(model), chosen(model)) == (["RNA", "first"], None)
    assert same(answer(predictor, model), base)
    for name in ("first", "RNA", "first", None, "RNA", None):
        use(model, name)
        assert chosen(model) == name
        assert same(answer(predictor, model), base if name is None else alone[name]), name
    assert attached(predictor.model) == []
    assert same(answer(predictor, predictor.model), base)


def test_attaching_and_choosing_copy_nothing_of_the_base(predictor: Predictor, saved: dict[str, Path]) -> None:
    trunk = {name: weight.data_ptr() for name, weight in predictor.model.state_dict(keep_vars=True).items()}
    learns = [weight.requires_grad for weight in predictor.model.parameters()]
    model = attach(predictor.model, {"first": saved["first"]}, predictor.manifest)
    model = attach(model, {"RNA": saved["RNA"]}, predictor.manifest)
    for name in ("first", "RNA", None):
        use(model, name)
        found = {
            key.replace(".base_layer.", "."): weight.data_ptr()
            for key, weight in model.state_dict(keep_vars=True).items()
            if "lora_" not in key
        }
        assert found == trunk, name
        assert not any(weight.requires_grad for weight in model.parameters()), name
    assert [weight.requires_grad for weight in predictor.model.parameters()] == learns


def test_what_is_merged_is_the_chosen_adapter(predictor: Predictor, saved: dict[str, Path]) -> None:
    model = attach(predictor.model, saved, predictor.manifest)
    assert same(answer(predictor, merged(model)), answer(predictor, predictor.model))
    for name in saved:
        use(model, name)
        expected, plain = answer(predictor, model), merged(model)
        assert attached(plain) == []
        for measurement, share in answer(predictor, plain).items():
            np.testing.assert_allclose(share, expected[measurement], rtol=1e-4, atol=1e-7)
    assert same(answer(predictor, model), expected)


def test_one_of_several_is_saved_and_loads_alone(predictor: Predictor, saved: dict[str, Path], tmp_path: Path) -> None:
    model = attach(predictor.model, saved, predictor.manifest)
    for name, sizes in (("first", SIZES), ("RNA", WIDER)):  # the second replaces the first
        folder = save_adapter(tmp_path / "again", model, sizes, predictor.manifest, name)
    assert (folder / "adapter.safetensors").read_bytes() == (saved["RNA"] / "adapter.safetensors").read_bytes()
    use(model, "RNA")
    alone = load_adapter(folder, predictor.model, predictor.manifest)
    assert same(answer(predictor, alone), answer(predictor, model))
    learning = {name for name, weight in alone.named_parameters() if weight.requires_grad}
    assert learning == set(adapter_weights(alone))


def test_names_that_cannot_be_and_adapters_of_others_are_refused(predictor: Predictor, saved: dict[str, Path]) -> None:
    model = attach(predictor.model, {"first": saved["first"]}, predictor.manifest)
    for name in ("", "a.b", "keys", "training"):
        with pytest.raises(UsageError, match="use letters, digits, '_' and '-', and no method's name"):
            attach(model, {name: saved["RNA"]}, predictor.manifest)
    with pytest.raises(UsageError, match="'first' is taken; attached: first"):
        attach(model, {"first": saved["RNA"]}, predictor.manifest)
    with pytest.raises(UsageError, match="no adapter 'second' is attached; there is first"):
        use(model, "second")
    with pytest.raises(UsageError, match="there is none"):
        use(predictor.model, "first")
    with pytest.raises(InputRefused, match="this one has ffffffffffff"):
        attach(model, {"RNA": saved["RNA"]}, predictor.manifest | {"model_sha256": "f" * 64})


def test_weights_that_name_the_bases_layers_are_refused_before_they_are_loaded(
    predictor: Predictor, tmp_path: Path
) -> None:
    folder, before = tmp_path / "adapter", predictor.model.norm.weight.detach().clone()
    save_adapter(folder, moved(predictor), SIZES, predictor.manifest)
    weights = load_file(folder / "adapter.safetensors") | {"default.weight": torch.zeros_like(before)}
    save_file(weights, folder / "adapter.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    write_manifest(folder, {key: manifest[key] for key in ("kind", "base_sha256", "adapter")})
    with pytest.raises(InputRefused, match="its weights are not those of the model's layers"):
        attach(predictor.model, {"norm": folder}, predictor.manifest)
    assert torch.equal(predictor.model.norm.weight, before)
    for sizes in ({"rank": 0}, {"rank": "two"}, {"ranks": 2}):
        (folder / "manifest.json").unlink()
        write_manifest(folder, manifest | {"adapter": sizes})
        with pytest.raises(InputRefused, match="not an adapter of this version"):
            attach(predictor.model, {"norm": folder}, predictor.manifest)


def test_an_adapter_says_its_share_of_the_weights_and_holds_no_others(
    predictor: Predictor, saved: dict[str, Path]
) -> None:
    model = attach(predictor.model, saved, predictor.manifest)
    trunk = sum(weight.numel() for weight in predictor.model.parameters())
    for name, folder in saved.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        own = sum(weight.numel() for weight in load_file(folder / "adapter.safetensors").values())
        assert manifest["n_weights"] == own
        assert manifest["share"] == share_of_weights(model, name) == own / trunk
        header = (folder / "adapter.safetensors").stat().st_size - 4 * own
        assert 0 < header < 200 * len(adapter_weights(model, name))


def test_an_adapter_of_a_model_of_real_size_has_less_than_2_percent_of_its_weights_and_takes_4_mb() -> None:
    sizes = {"n_features": {"RNA": 20_000, "protein": 300}, "n_prompts": dict.fromkeys(PROMPTS, 50)}
    with torch.device("meta"):  # shapes only: nothing is computed
        model = CellModel(ModelConfig(**sizes, n_perturbations=2000, width=512, layers=9, heads=8, query_layers=1))
    n_weights = sum(weight.numel() for weight in model.parameters())
    assert 58e6 < n_weights < 62e6
    beside = adapted(model, AdapterSettings())
    own = sum(weight.numel() for weight in adapter_weights(beside).values())
    assert share_of_weights(beside) == own / n_weights
    assert 0.01 < own / n_weights < 0.02
    assert 3e6 < 4 * own < 4.5e6
