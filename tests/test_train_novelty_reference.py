"""Cells of kinds that a model never saw have small p values; of known kinds, small ones are as rare as they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from small_checkpoint import write_checkpoint

from train import checkpoint
from train.novelty import Reference, distances, make_reference
from train.predictor import Predictor
from train.pretrained import from_pretrained, save_pretrained


def test_p_values_of_known_kinds_are_uniform_and_of_others_small() -> None:
    torch.manual_seed(0)
    known, held_out, same = torch.randn(2000, 8), torch.randn(999, 8), torch.randn(1000, 8)
    reference = make_reference(known, held_out)
    assert reference is not None
    p = reference.p_values(same)
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 0.05
    assert (reference.p_values(same + 4) == np.float32(1 / 1000)).all()
    assert p.max() <= 1


def test_distances_are_means_to_the_nearest() -> None:
    embedding_RD = torch.arange(40.0)[:, None]
    assert distances(torch.tensor([[0.0]]), embedding_RD).item() == np.mean(range(15))


def test_few_cells_make_no_reference() -> None:
    assert make_reference(torch.randn(19, 4), torch.randn(100, 4)) is None
    assert make_reference(torch.randn(100, 4), torch.randn(19, 4)) is None


def test_a_checkpoint_keeps_it_and_what_is_said_of_cells_does_not_count(tmp_path: Path) -> None:
    loaded = checkpoint.load(write_checkpoint(tmp_path / "plain"))
    counts = csr_matrix(np.random.default_rng(0).poisson(2, (60, 40)).astype(np.float32))
    plain = Predictor(loaded)
    cells = plain.cells({"RNA": counts})
    assert np.isnan(plain.novelty(cells)).all()
    embedding = torch.from_numpy(plain.embed(cells))
    reference = make_reference(embedding[:30], embedding[30:])
    words = {**loaded.manifest, "measurements": list(loaded.vocabulary)}
    folder = checkpoint.export(
        tmp_path / "kept", loaded.model, loaded.tokens, loaded.vocabulary, loaded.prompts, words, "", reference
    )
    kept = Predictor.load(folder)
    assert isinstance(kept.reference, Reference)
    again = from_pretrained(save_pretrained(kept, tmp_path / "again"))
    p = kept.novelty(cells)
    np.testing.assert_array_equal(again.novelty(cells), p)
    assert (p[30:] > 0).all()
    said = kept.cells({"RNA": counts}, {"tissue": ["lung"] * 60, "time": ["3"] * 60})
    np.testing.assert_array_equal(kept.novelty(said), p)
    strange = kept.cells({"RNA": csr_matrix(np.eye(60, 40, dtype=np.float32) * 900)})
    assert np.median(kept.novelty(strange)) <= 2 / 31
