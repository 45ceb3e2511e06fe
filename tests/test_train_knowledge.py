"""Knowledge reaches the features it is of, degrees survive the null arm, and a checkpoint carries what it used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_loop import lake, settings  # noqa: F401  lake is a fixture

from store.errors import InputRefused, MissingError, SettingsError
from train import checkpoint
from train.config import ModelConfig
from train.identity import Identity, Pathways
from train.knowledge import gather_knowledge, read_aliases, read_sets, read_vectors
from train.loop import Run

NAMES = [("ENSG1.4", "A"), ("ENSG2", "B"), ("ENSG3", "C"), ("P1", "CD-A")]


def test_features_are_found_by_id_name_and_alias_whatever_the_version() -> None:
    known = gather_knowledge(
        NAMES,
        {"one": ["ENSG1", "B", "nobody"], "two": ["A", "C"], "lonely": ["C"]},
        {"text": {"B": np.ones(3, np.float32)}},
        {"P1": "A"},
    )
    assert known.sets == ("one", "two")
    pairs = set(zip(known.feature_E.tolist(), known.set_E.tolist(), strict=True))
    assert pairs == {(1, 0), (2, 0), (1, 1), (3, 1), (4, 1)}
    assert known.vectors["text"][2].tolist() == [1, 1, 1]
    assert not known.vectors["text"][[0, 1, 3, 4]].any()
    with pytest.raises(InputRefused, match="no set has two members among the 4 features"):
        gather_knowledge(NAMES, {"x": ["Q", "R"]}, {})
    with pytest.raises(InputRefused, match="none of 1 vectors is of a feature"):
        gather_knowledge(NAMES, {}, {"text": {"Q": np.ones(2, np.float32)}})


def test_a_protein_inherits_from_each_of_its_genes(tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("P1\tA\nP2\tB\nP1\tC\n")
    aliases = read_aliases(table)
    assert aliases == {"P1": ("A", "C"), "P2": ("B",)}
    sets = {"one": ["A", "B"], "two": ["C", "B"]}
    vectors = {"A": np.array([4, 0], np.float32), "C": np.array([0, 2], np.float32)}
    known = gather_knowledge(NAMES, sets, {"text": vectors}, aliases)
    assert known.set_E[known.feature_E == 4].tolist() == [0, 1]
    assert known.vectors["text"].tolist() == [[0, 0], [4, 0], [0, 0], [0, 2], [2, 1]]


def test_sets_of_one_name_are_told_apart_however_many_files_have_it(tmp_path: Path) -> None:
    files = [tmp_path / folder / name for name in ("sets.gmt", "more.gmt") for folder in "abc"]
    for number, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"S\tabout\tG{number}\tH{number}\n" * (1 + (number == 5)))
    found = read_sets(files, 2, 5)
    assert {name: members[0] for name, members in found.items()} == {
        "S": "G0",
        "sets: S": "G1",
        "sets 2: S": "G2",
        "more: S": "G3",
        "more 2: S": "G4",
        "more 3: S": "G5",
        "more 4: S": "G5",
    }


def test_permuted_memberships_keep_every_degree() -> None:
    names = [(f"g{number}", "") for number in range(50)]
    rng = np.random.default_rng(0)
    sets = {f"s{number}": [f"g{x}" for x in rng.choice(50, 5 + number, replace=False)] for number in range(8)}
    plain, dealt = (gather_knowledge(names, sets, {}, permute=seed) for seed in (None, 1))
    for one in ("feature_E", "set_E"):
        assert (np.bincount(getattr(plain, one)) == np.bincount(getattr(dealt, one))).all()
    pairs = [set(zip(known.feature_E.tolist(), known.set_E.tolist(), strict=True)) for known in (plain, dealt)]
    assert len(pairs[0] & pairs[1]) < 0.5 * len(pairs[0])


def test_an_identity_is_the_sum_that_the_formula_says() -> None:
    config = ModelConfig({"RNA": 4}, {}, 2, width=8, n_sets=2, n_memberships=5, frozen={"text": 3})
    torch.manual_seed(0)
    identity = Identity(config)
    feature, sets = torch.tensor([1, 1, 2, 3, 4]), torch.tensor([0, 1, 0, 1, 1])
    vectors = torch.randn(5, 3)
    identity.know(feature, sets, {"text": vectors})
    asked = torch.tensor([4, 1, 1, 2], dtype=torch.int32)
    found = identity(asked)
    assert identity.sets is not None
    for line, number in enumerate(asked.tolist()):
        mine = sets[feature == number]
        expected = identity.own.weight[number] + identity.sets.weight[mine].sum(0) / len(mine) ** 0.5
        expected = expected + identity.adapters["text"](vectors[number])
        torch.testing.assert_close(found[line], expected)
    found.sum().backward()
    assert identity.sets.weight.grad is not None
    assert identity(torch.empty(0, dtype=torch.int32)).shape == (0, 8)


def test_a_pathway_token_reads_its_visible_members_and_nothing_else() -> None:
    config = ModelConfig({"RNA": 6}, {}, 2, width=8, heads=2, n_sets=3, n_memberships=8, pathways=2)
    torch.manual_seed(0)
    identity, pathways = Identity(config), Pathways(config)
    torch.nn.init.normal_(pathways.own.weight)
    feature = torch.tensor([1, 1, 2, 2, 3, 3, 4, 5])
    sets = torch.tensor([0, 2, 0, 2, 0, 1, 2, 2])  # 0: 1 2 3    1: 3    2: 1 2 4 5
    identity.know(feature, sets, {})
    pathways.choose(sets)
    assert pathways.chosen_S.tolist() == [0, -1, 1]
    visible, cell = torch.tensor([1, 3, 4, 6, 2, 6]), torch.tensor([0, 0, 0, 0, 1, 1])
    values = torch.randn(6, 8)
    plain = pathways(values, visible, cell, 3, identity)
    assert plain.shape == (3, 2, 8)
    reads = {(0, 0): {0, 1}, (0, 1): {0, 2}, (1, 0): {4}, (1, 1): {4}, (2, 0): set(), (2, 1): set()}
    for token in range(6):
        other = values.clone()
        other[token] += 1.0
        changed = (pathways(other, visible, cell, 3, identity) - plain).abs().amax(-1) > 1e-6
        for (one, pathway), members in reads.items():
            assert bool(changed[one, pathway]) == (token in members), (token, one, pathway)
    order = torch.tensor([5, 2, 0, 3, 1, 4])
    torch.testing.assert_close(pathways(values[order], visible[order], cell[order], 3, identity), plain)


def test_files_that_are_no_knowledge_are_refused(tmp_path: Path) -> None:
    gmt, npz, table = tmp_path / "s.gmt", tmp_path / "v.npz", tmp_path / "a.tsv"
    with pytest.raises(MissingError, match="no such file of gene sets"):
        read_sets([gmt])
    gmt.write_text("one\tabout\tA\tB,1.0\tC\n\ntwo\tabout\tA\n")
    assert read_sets([gmt], 2, 5) == {"one": ("A", "B", "C")}
    with pytest.raises(InputRefused, match="no set has 10 to 200 members"):
        read_sets([gmt])
    gmt.write_text("one two three\n")
    with pytest.raises(InputRefused, match="line 1: a set is a name"):
        read_sets([gmt])
    np.savez(npz, ids=np.array(["A", "B"]), vectors=np.array([[1.0, 2.0], [3.0, np.nan]]))
    with pytest.raises(InputRefused, match="one finite vector for each id"):
        read_vectors(npz)
    np.savez(npz, ids=np.array([{"a": 1}], dtype=object), vectors=np.ones((1, 2)))
    with pytest.raises(InputRefused, match="not an npz with ids and vectors"):
        read_vectors(npz)
    table.write_text("P1\tA\nP2\n")
    with pytest.raises(InputRefused, match="line 2: 1 columns"):
        read_aliases(table)


def test_a_run_with_knowledge_exports_what_it_used(lake: str, tmp_path: Path) -> None:  # noqa: F811
    gmt, npz = tmp_path / "sets.gmt", tmp_path / "text.npz"
    gmt.write_text(
        "".join(f"s{k}\tabout\t" + "\t".join(f"RNA{k + 3 * n:04d}" for n in range(12)) + "\n" for k in range(3))
    )
    np.savez(npz, ids=np.array(["RNA0001", "protein0002"]), vectors=np.eye(2, 6, dtype=np.float32))
    known = {"sets": [str(gmt)], "text": str(npz), "days": {str(gmt): "2020-02-02"}}
    with pytest.raises(SettingsError, match="pathways=2: name their GMT files"):
        settings(lake, tmp_path, model={"width": 16, "pathways": 2})
    run = Run(settings(lake, tmp_path, knowledge=known, model={"width": 16, "pathways": 2}), 1)
    assert run.plain.config.n_sets == 3
    assert run.plain.pathways is not None
    assert (run.plain.pathways.chosen_S >= 0).sum() == 2
    made = checkpoint.load(run.train().checkpoint)
    assert made.manifest["knowledge"][str(gmt)]["day"] == "2020-02-02"
    for (name, ours), theirs in zip(run.plain.state_dict().items(), made.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert made.model.identity.border_F[-1] == 36
