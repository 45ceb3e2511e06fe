"""A replica around a real checkpoint: the same answers as the predictor itself, whatever shares the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_predictor import FakePredictor
from small_checkpoint import write_checkpoint

from serve.decode import Cells, Decoder
from serve.errors import StaleModel, Unavailable, without_place
from serve.held import load_predictor
from serve.model import Annotate, Embed, Forecast, Generate, Perturb, Translate
from serve.replica import Replica
from serve.settings import Batching, Limits, ServeSettings
from store.errors import InputRefused
from train.predictor import Predictor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint")


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor.load(checkpoint)


@pytest.fixture(scope="module")
def replica(checkpoint: Path) -> Iterator[Replica]:
    settings = ServeSettings(checkpoint=str(checkpoint), batching=Batching(budget_tokens=512, piece_tokens=128))
    replica = Replica(settings)
    yield replica
    replica.close()


def some_cells(predictor: Predictor, n_cells: int, seed: int, *, protein: bool = False, **prompts: Any) -> Cells:
    rng = np.random.default_rng(seed)
    request: dict[str, Any] = {
        "RNA": [
            {f"G{gene}": int(rng.integers(1, 20)) for gene in rng.choice(40, rng.integers(1, 30), replace=False)}
            for _ in range(n_cells)
        ]
    }
    if protein:
        request["protein"] = [{f"CD{i}": int(rng.integers(0, 50)) for i in range(5)} for _ in range(n_cells)]
    decoder = Decoder(predictor.vocabulary, predictor.prompts, predictor.manifest["model_sha256"], Limits())
    return decoder.decode(request, prompts).cells


def test_one_request_gets_the_predictors_own_answer(replica: Replica, predictor: Predictor) -> None:
    cells = some_cells(predictor, 3, seed=1, protein=True, tissue="lung", time=[1, 2, 3])
    own = predictor.embed(predictor.cells(cells.counts, cells.prompts))
    np.testing.assert_allclose(asyncio.run(replica.ask(cells, Embed())), own, rtol=0, atol=1e-5)


def test_answers_do_not_depend_on_what_shares_the_batch(replica: Replica, predictor: Predictor) -> None:
    asked = [
        some_cells(predictor, 1 + seed % 20, seed, protein=seed % 3 == 0, **({"tissue": "blood"} if seed % 2 else {}))
        for seed in range(30)
    ]

    async def all_at_once() -> list[np.ndarray]:
        return await asyncio.gather(*(replica.ask(cells, Embed()) for cells in asked))

    for cells, together in zip(asked, asyncio.run(all_at_once()), strict=True):
        alone = predictor.embed(predictor.cells(cells.counts, cells.prompts))
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_effects_over_pieces_equal_the_effect_over_all_cells(replica: Replica, predictor: Predictor) -> None:
    cells = some_cells(predictor, 50, seed=2, protein=True)
    single, double = asyncio.run(replica.ask(cells, Perturb((("G1",), ("G1", "G2")))))
    for targets, shifts in ((["G1"], single), (["G1", "G2"], double)):
        own = predictor.perturb(predictor.cells(cells.counts, cells.prompts), targets)
        for name, shift in shifts.items():
            np.testing.assert_allclose(shift.control_G, own[name].control_G, rtol=0, atol=1e-4)
            np.testing.assert_allclose(shift.delta_G, own[name].delta_G, rtol=0, atol=1e-4)
            assert np.abs(shift.delta_G).max() > 0.01


def test_types_and_other_measurements_are_those_that_the_predictor_tells(
    replica: Replica, predictor: Predictor
) -> None:
    cells = some_cells(predictor, 50, seed=3, tissue="blood")
    own = predictor.cells(cells.counts, cells.prompts)
    told = asyncio.run(replica.ask(cells, Annotate()))
    np.testing.assert_allclose(told[:, 1:], predictor.annotate(own), rtol=0, atol=1e-5)
    np.testing.assert_allclose(told[:, 1:].sum(1), 1, atol=1e-5)
    assert np.isnan(told[:, 0]).all(), "this checkpoint keeps no reference"
    found = asyncio.run(replica.ask(cells, Translate("protein", (3, 0))))
    np.testing.assert_allclose(found, predictor.shares(own, "protein")[:, [3, 0]], rtol=0, atol=1e-5)
    later, expected = asyncio.run(replica.ask(cells, Forecast(2.0))), predictor.forecast(own, 2.0)
    for name, shift in later.items():
        np.testing.assert_allclose(shift.delta_G, expected[name].delta_G, rtol=0, atol=1e-4)


def test_the_same_seed_draws_the_same_cells_whatever_else_is_asked(replica: Replica, predictor: Predictor) -> None:
    decoder = Decoder(predictor.vocabulary, predictor.prompts, predictor.manifest["model_sha256"], Limits())
    cells = decoder.said({"tissue": "lung"}, 60)  # several pieces

    async def drawn() -> list[Any]:
        other = replica.ask(some_cells(predictor, 5, seed=1), Embed())
        return await asyncio.gather(*(replica.ask(cells, Generate("RNA", 200.0, seed)) for seed in (1, 1, 2)), other)

    first, again, another, _ = (part for part in asyncio.run(drawn()))
    np.testing.assert_array_equal(first.toarray(), again.toarray())
    assert (first != another).nnz > 0
    assert len({row.tobytes() for row in first.toarray()}) > 50, "pieces must not draw the same"
    assert first.sum(1).mean() == pytest.approx(200, rel=0.1)


def test_cells_written_for_another_checkpoint_are_refused(replica: Replica, predictor: Predictor) -> None:
    cells = some_cells(predictor, 1, seed=1)
    with pytest.raises(StaleModel):
        asyncio.run(replica.ask(Cells(cells.counts, cells.prompts, 1, "another"), Embed()))


def test_threads_are_those_of_the_settings(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    settings = ServeSettings(checkpoint=str(checkpoint), threads=2)
    replica = Replica(settings)
    assert torch.get_num_threads() == 2
    replica.close()
    torch.set_num_threads(before)
    with pytest.raises(Unavailable):
        replica.check()


def test_a_checkpoint_with_a_flipped_bit_is_not_served(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputRefused, match=r"model\.safetensors"):
        load_predictor(ServeSettings(checkpoint=str(folder)))


def test_an_answer_that_is_no_finite_number_is_refused_but_an_unknown_novelty_is_not() -> None:
    class Broken(FakePredictor):
        def embed(self, cells: Any) -> np.ndarray:
            found = super().embed(cells)
            found[cells.counts["RNA"].toarray()[:, 1] > 4] = np.inf
            return found

        def novelty(self, cells: Any) -> np.ndarray:
            return np.full(len(cells.tissue), np.nan, np.float32)

        def forecast(self, cells: Any, elapsed: float) -> Any:
            return {
                name: replace(part, delta_G=part.delta_G * np.nan)
                for name, part in super().forecast(cells, elapsed).items()
            }

    fake = Broken()
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: fake)
    decoder = Decoder(fake.vocabulary, fake.prompts, "a" * 64, Limits())
    cells = decoder.decode({"RNA": [{"G1": 1.0}, {"G1": 5.0}]}, {}).cells
    with pytest.raises(InputRefused, match="cell 1: the model's answer is no finite number"):
        asyncio.run(replica.ask(cells, Embed()))
    with pytest.raises(InputRefused, match="no finite number"):
        asyncio.run(replica.ask(cells, Forecast(1.0)))
    assert np.isnan(asyncio.run(replica.ask(cells, Annotate()))[:, 0]).all()
    replica.close()


def test_places_are_taken_out_of_what_is_said() -> None:
    for place in ("runs/a", "/srv/runs/a", "runs/a/"):
        whole = f"{Path(place)}: no manifest; {Path(place) / 'model.safetensors'} differs"
        assert without_place(whole, place, "it") == "it: no manifest; it/model.safetensors differs"
    assert without_place("./model: a. b ..", ".", "it") == "it/model: a. b .."
    assert without_place("nothing", "", "it") == "nothing"
    assert without_place("delete --lake /lake, then create", "/lake", "it") == "delete --lake it, then create"
