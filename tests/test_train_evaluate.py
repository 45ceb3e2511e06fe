"""A checkpoint is judged beside the floor, after an audit that fails closed, through the command that users type."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from ingest.simulate import SimulationSettings, simulate
from store.errors import InputRefused, UsageError, VerificationError
from store.schema import DatasetPlan, Features
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot
from store.writer import LakeWriter, write_counts
from train.__main__ import main
from train.evaluation.effects import effects
from train.evaluation.flow import FlowSettings
from train.evaluation.folds import FoldSettings
from train.evaluation.head import HeadSettings, fit_head, load_head
from train.evaluation.judge import Question, judge, look_for_leaks
from train.evaluation.nulls import Nulled, dealt_labels, dealt_members
from train.evaluation.ours import NAME, ModelEmbedder, cells_of, expected_logs, pretrained
from train.evaluation.report import write_report
from train.evaluation.score import FEWEST_UNITS, REPLICATE
from train.evaluation.scratch import ScratchSettings, adapt_on
from train.evaluation.study import Study, only_measured, read_study
from train.loop import Run
from train.predictor import Predictor
from train.settings import RunSettings

TEST = FoldSettings(by="split", held=("test",))


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = simulate(SimulationSettings(cells=1500))
    names = {"RNA": made.truth.genes, "protein": made.truth.proteins}
    features = {name: Features(ids, ids, ["x"] * len(ids), [0] * len(ids)) for name, ids in names.items()}
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        reservation = writer.reserve(DatasetPlan("sim", "synthetic_construct", "k", 1500, features))
        blocks = [write_counts(reservation, name, 0, made.counts[name]) for name in features]
        writer.commit(reservation, made.obs, blocks)
    create_snapshot(uri, "s", SnapshotSettings(fractions={"train": 0.5, "val": 0.2, "test": 0.3}))
    create_snapshot(uri, "other", SnapshotSettings(seed=9, fractions={"train": 0.5, "test": 0.5}))
    return uri


@pytest.fixture(scope="module")
def trained(lake: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    small = {"model": {"width": 32, "layers": 1, "heads": 2}, "data": {"tokens": 64}, "trackers": [], "report": False}
    output = str(tmp_path_factory.mktemp("runs"))
    values = {"lake": lake, "snapshot": "s", "output": output, "workers": 1, "steps": 80, **small}
    return Run(parse_settings(RunSettings, values, where="test"), 1).train().checkpoint


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake in which RNA and protein were measured of 700 cells, protein alone of 300, RNA alone of 200."""
    made = simulate(SimulationSettings(cells=1200))
    names = {"RNA": made.truth.genes, "protein": made.truth.proteins}
    uri = str(tmp_path_factory.mktemp("lakes") / "mosaic")
    datasets = {
        "both": (0, 700, ("RNA", "protein")),
        "tags": (700, 1000, ("protein",)),
        "genes": (1000, 1200, ("RNA",)),
    }
    with LakeWriter(uri) as writer:
        for name, (first, stop, have) in datasets.items():
            features = {
                one: Features(names[one], names[one], ["x"] * len(names[one]), [0] * len(names[one])) for one in have
            }
            reservation = writer.reserve(DatasetPlan(name, "synthetic_construct", name, stop - first, features))
            blocks = [write_counts(reservation, one, 0, made.counts[one][first:stop]) for one in have]
            writer.commit(reservation, made.obs.iloc[first:stop].reset_index(drop=True), blocks)
    create_snapshot(uri, "s", SnapshotSettings(fractions={"train": 0.5, "val": 0.2, "test": 0.3}))
    create_snapshot(uri, "tags", SnapshotSettings(where="measured_RNA == False", fractions={"train": 0.5, "test": 0.5}))
    return uri


def question(lake: str, suite: str, **words: object) -> Question:
    return Question(suite, lake, "s", **({"folds": TEST, "seeds": 1} | words))  # type: ignore[arg-type]


def test_a_study_is_the_snapshots_cells(lake: str) -> None:
    snapshot = open_snapshot(lake, "s")
    whole = read_study(snapshot)
    assert whole.n_cells == 1500
    assert whole.counts["RNA"].sum() == snapshot.block("RNA", 0, snapshot.n_rows).counts.sum()
    some = read_study(snapshot, max_cells=300)
    assert 300 <= some.n_cells <= 302
    assert set(some.label("split")) == {"train", "val", "test"}
    joinid = int(some.obs["soma_joinid"].iloc[7])
    row = int(np.flatnonzero(whole.obs["soma_joinid"] == joinid)[0])
    assert (some.counts["RNA"][7] != whole.counts["RNA"][row]).nnz == 0


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ("perturb", {"columns": ("tissue",)}),
        ("annotate", {"members": 2}),
        ("embed", {}),
        ("agnostic", {"source": "protein"}),
        ("calibration", {"folds": FoldSettings(by="split", held=("test",), calibrate_on=("val",))}),
        ("translate", {"measurement": "protein"}),
        (
            "translate",
            {
                "measurement": "protein",
                "gated": True,
                "folds": FoldSettings(by="split", held=("test",), calibrate_on=("val",)),
            },
        ),
    ],
)
def test_every_suite_judges_the_model_beside_floor_and_replicate(
    lake: str, trained: str, tmp_path: Path, suite: str, words: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.evaluation.judge.adapt_on", partial(adapt_on, settings=ScratchSettings(steps=25)))
    judged = judge(question(lake, suite, **words), trained)
    values, scores = judged.values, judged.scores
    methods = {value.method for value in values}
    assert {NAME, REPLICATE} < methods
    assert len(methods) >= 4
    for one in scores:
        assert np.isfinite([one.u, one.b, one.r]).all()
        assert one.b_method not in (NAME, REPLICATE)
        told = {"above", "not told apart", "below", "not informative"}
        assert one.verdict in (told if one.n_units >= FEWEST_UNITS else {"too few units"})
    as_json, as_html = write_report(tmp_path, suite, values, scores, {"suite": suite})
    assert len(json.loads(as_json.read_text())["values"]) == len(values)
    page = as_html.read_text()
    assert page.count("data:image/png;base64,") == len(scores)
    assert all(one.metric in page for one in scores)


@pytest.mark.parametrize(
    ("suite", "arm", "words"),
    [
        ("annotate", "labels", {}),
        ("perturb", "prompts", {"columns": ("tissue",)}),
        ("translate", "pairs", {"measurement": "protein"}),
    ],
)
def test_in_a_null_arm_ours_falls(
    lake: str, trained: str, tmp_path: Path, suite: str, arm: str, words: dict[str, object]
) -> None:
    judged = judge(question(lake, suite, null=True, **words), trained)
    assert list(judged.nulls) == [arm]
    one, dealt = judged.scores[0], judged.nulls[arm][0]
    assert one.metric == dealt.metric
    assert (one.b, one.r) == (dealt.b, dealt.r)
    assert dealt.u < one.u - 0.05, "every first metric is better when higher"
    _, page = write_report(tmp_path, suite, judged.values, judged.scores, {}, judged.nulls)
    assert f"Null arm: {arm} dealt at random" in page.read_text()


def test_labels_and_memberships_are_dealt_within_bounds(lake: str) -> None:
    study = read_study(open_snapshot(lake, "s"))
    dealt = dealt_labels(study, "perturbation", ("donor_id",), 0)
    assert (dealt.label("perturbation") != study.label("perturbation")).mean() > 0.1
    plain = np.isin(study.label("perturbation"), ("", "control"))
    assert (dealt.label("perturbation")[plain] == study.label("perturbation")[plain]).all()
    for donor in set(study.label("donor_id")):
        here = study.label("donor_id") == donor
        assert sorted(dealt.label("perturbation")[here]) == sorted(study.label("perturbation")[here])
    times = dealt_labels(study, "time", (), 0).obs["time"]
    assert times.dtype == study.obs["time"].dtype
    members = {"a": ("x", "y", "z"), "b": ("x", "w")}
    again = dealt_members(members, 1)
    assert {name: len(inside) for name, inside in again.items()} in ({"a": 3, "b": 2}, {"a": 2, "b": 2})
    assert set().union(*again.values()) == {"x", "y", "z", "w"}


def test_prompts_are_dealt_at_random_and_none_is_its_own() -> None:
    class Echo:
        name = "echo"

        def fit(self, train: Study) -> Echo:
            return self

        def predict(self, control: object, perturbation: str, context: str) -> str:
            return perturbation

    names = [f"t{number:02d}" for number in range(40)]
    train = Study(
        {"RNA": csr_matrix((41, 1), dtype=np.float32)},
        {"RNA": ["g"]},
        pd.DataFrame({"perturbation": ["control", *names]}),
    )
    asked = [(name, context) for name in [*names, "never seen"] for context in ("a", "b")]
    dealt = {}
    for seed in range(3):
        method = Nulled(Echo(), "prompts", "perturbation", (), seed).fit(train)
        dealt[seed] = [method.predict(None, *question) for question in asked]
        assert [method.predict(None, *question) for question in reversed(asked)] == dealt[seed][::-1]
        assert all(told != name and told in names for told, (name, _) in zip(dealt[seed], asked, strict=True))
        assert max(Counter(dealt[seed]).values()) <= 9, "of 82 questions 2 for each name"
        assert len(set(dealt[seed])) >= 25
    assert np.mean([one == other for one, other in zip(dealt[0], dealt[1], strict=True)]) < 0.2
    assert np.mean([one == other for one, other in zip(dealt[0][::2], dealt[0][1::2], strict=True)]) < 0.25


def test_the_floor_is_judged_without_a_model(lake: str) -> None:
    judged = judge(question(lake, "annotate"))
    values, scores = judged.values, judged.scores
    assert NAME not in {value.method for value in values}
    assert {one.verdict for one in scores} <= {"floor only", "not informative"}


def test_cells_without_a_type_judge_no_telling_of_types(lake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_study(open_snapshot(lake, "s"))

    def told(change: Callable[[pd.Series], pd.Series]) -> Question:
        obs = whole.obs.assign(cell_type=change(whole.obs["cell_type"].astype(object)))
        monkeypatch.setattr("train.evaluation.judge.read_study", lambda *_: replace(whole, obs=obs))
        return question(lake, "annotate")

    third = np.arange(whole.n_cells) % 3 == 0
    study, folds, _ = look_for_leaks(told(lambda types: types.mask(third, "unknown")))
    assert study.n_cells == whole.n_cells - third.sum()
    assert "unknown" not in study.label("cell_type")
    assert all(len(fold.train_C) == study.n_cells for fold in folds)
    asked = told(lambda types: types.mask(third, "unknown"))
    perturbed, _, _ = look_for_leaks(replace(asked, suite="perturb"))
    assert perturbed.n_cells == whole.n_cells
    lost = whole.obs.assign(perturbation=whole.obs["perturbation"].astype(object).mask(third, "unknown"))
    monkeypatch.setattr("train.evaluation.judge.read_study", lambda *_: replace(whole, obs=lost))
    screened, _, _ = look_for_leaks(replace(asked, suite="perturb"))
    assert screened.n_cells == whole.n_cells - third.sum(), "neither a control nor a target"
    with pytest.raises(UsageError, match="no cell says one; it takes two types"):
        look_for_leaks(told(lambda types: types.mask(types != "", "unknown")))
    with pytest.raises(UsageError, match=r"all .* cells that say one have 'T cell'; it takes two types"):
        look_for_leaks(told(lambda types: types.mask(types != "", "T cell")))
    with pytest.raises(UsageError, match="by = 'dose': no cell has any"):
        look_for_leaks(replace(question(lake, "perturb"), folds=FoldSettings(by="dose")))


@pytest.mark.parametrize(
    ("suite", "words", "have"),
    [
        ("perturb", {"columns": ("tissue",)}, ["RNA"]),
        ("annotate", {}, ["RNA"]),
        ("annotate", {"measurement": "protein"}, ["protein"]),
        ("embed", {}, ["RNA"]),
        ("translate", {"measurement": "protein"}, ["RNA", "protein"]),
        ("agnostic", {"source": "protein"}, ["RNA"]),
    ],
)
def test_cells_that_were_not_measured_change_no_number(
    mosaic: str, monkeypatch: pytest.MonkeyPatch, suite: str, words: dict[str, object], have: list[str]
) -> None:
    whole = read_study(open_snapshot(mosaic, "s"))
    had_C = np.all([whole.obs[f"measured_{name}"].to_numpy(bool) for name in have], axis=0)
    mixed = judge(question(mosaic, suite, **words))
    assert (mixed.n_cells, mixed.left_out) == (had_C.sum(), (~had_C).sum())
    assert mixed.left_out >= 200
    monkeypatch.setattr("train.evaluation.judge.read_study", lambda *_: whole.take(had_C))
    alone = judge(question(mosaic, suite, **words))
    assert alone.left_out == 0
    assert mixed.values
    assert [repr(value) for value in mixed.values] == [repr(value) for value in alone.values]


def test_a_head_learns_from_measured_cells_alone_and_says_so(mosaic: str, tmp_path: Path) -> None:
    settings = HeadSettings(mosaic, "s", columns=("tissue",))
    head = fit_head(settings, tmp_path / "head")
    whole = read_study(open_snapshot(mosaic, "s"))
    train = whole.take(whole.label("split") == "train")
    measured_C = train.obs["measured_RNA"].to_numpy(bool)
    assert head.table.treated_EG.tobytes() == effects(train.take(measured_C), "RNA", ("tissue",)).treated_EG.tobytes()
    cells = json.loads((tmp_path / "head" / "manifest.json").read_text())["cells"]
    assert cells == {"learned_from": measured_C.sum(), "left_out": (~measured_C).sum()}
    assert cells["left_out"] > 50


def test_what_no_cell_has_is_refused_and_the_audit_looks_at_all_cells(
    mosaic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputRefused, match="the cells have no RNA; measurements: protein"):
        judge(replace(question(mosaic, "annotate"), snapshot="tags"))
    whole = read_study(open_snapshot(mosaic, "s"))
    without = whole.take(~whole.obs["measured_RNA"].to_numpy(bool))
    all_cells, _, _ = look_for_leaks(question(mosaic, "annotate", measurement=""))
    assert (all_cells.n_cells, all_cells.left_out) == (1200, 0)
    monkeypatch.setattr("train.evaluation.judge.read_study", lambda *_: without)
    monkeypatch.setattr("train.evaluation.head.read_study", lambda *_: without)
    with pytest.raises(InputRefused, match=r"of the 300 cells none has RNA measured \(RNA of 0\)"):
        judge(question(mosaic, "annotate"))
    with pytest.raises(InputRefused, match=r"none has RNA and protein measured \(RNA of 0, protein of 300\)"):
        judge(question(mosaic, "translate", measurement="protein"))
    with pytest.raises(InputRefused, match="none has RNA measured"):
        fit_head(HeadSettings(mosaic, "s"), tmp_path / "head")


def test_a_measured_cell_without_a_count_is_zero_and_not_absent(mosaic: str) -> None:
    whole = read_study(open_snapshot(mosaic, "s")).take(np.arange(40))
    counts = {name: part.copy() for name, part in whole.counts.items()}
    had_C = whole.obs["measured_RNA"].to_numpy(bool)
    row = int(np.flatnonzero(had_C)[0])
    counts["RNA"] = csr_matrix(counts["RNA"].multiply((np.arange(40) != row)[:, None]))
    emptied = replace(whole, counts=counts)
    assert emptied.has("RNA").tolist() == had_C.tolist()
    assert only_measured(emptied, ["RNA"]).n_cells == had_C.sum()
    unsaid = replace(emptied, obs=emptied.obs.drop(columns="measured_RNA"))
    assert unsaid.has("RNA").tolist() == (had_C & (np.arange(40) != row)).tolist(), "nobody says of which it was made"
    twice = only_measured(only_measured(whole, ["RNA"]), ["protein"])
    assert twice.left_out == 40 - twice.n_cells


def test_a_model_is_shown_of_a_cell_what_was_measured_of_it(lake: str, trained: str) -> None:
    predictor = Predictor.load(trained)
    whole = read_study(open_snapshot(lake, "s"), max_cells=60)
    has_C = np.arange(whole.n_cells) % 2 == 0
    protein = csr_matrix(whole.counts["protein"].multiply(has_C[:, None]))
    mixed = replace(
        whole, counts={"RNA": whole.counts["RNA"], "protein": protein}, obs=whole.obs.assign(measured_protein=has_C)
    )
    shown = cells_of(predictor, mixed, ["RNA", "protein"], ("organism",)).measured
    assert shown["RNA"].all()
    assert shown["protein"].tolist() == has_C.tolist()
    found = ModelEmbedder(predictor).embed(mixed)
    rna = replace(mixed, counts={"RNA": whole.counts["RNA"]}, features={"RNA": whole.features["RNA"]})
    for rows, expected in (
        (has_C, ModelEmbedder(predictor).embed(whole)),
        (~has_C, ModelEmbedder(predictor).embed(rna)),
    ):
        np.testing.assert_allclose(found[rows], expected[rows], atol=1e-5)
    claimed = ModelEmbedder(predictor).embed(replace(mixed, obs=whole.obs))  # protein of all, and nothing found
    assert np.abs(claimed[~has_C] - found[~has_C]).max() > 1e-2


def test_cells_that_a_checkpoint_saw_may_not_judge_it(lake: str, trained: str) -> None:
    predictor = Predictor.load(trained)
    asked = replace(question(lake, "annotate"), folds=FoldSettings(by="donor_id", folds=2))
    _, folds, findings = look_for_leaks(asked, predictor)
    assert {one.check for one in findings} == {"pretraining"}
    assert len(findings) == len(folds)
    with pytest.raises(VerificationError, match="no number is made"):
        judge(asked, trained)
    other = open_snapshot(lake, "other")
    study = read_study(other)
    seen = pretrained(predictor, study, other)
    first = read_study(open_snapshot(lake, "s"))
    expected = set(first.obs["soma_joinid"][first.label("split") == "train"])
    assert set(study.obs["soma_joinid"][seen]) == expected
    unseen = replace(question(lake, "annotate"), folds=FoldSettings(by="split", held=("test",)))
    assert look_for_leaks(unseen, predictor)[2] == []
    plain, predictor.manifest = predictor.manifest, predictor.manifest | {"chosen": {"split": "test", "of": 5}}
    (finding,) = look_for_leaks(unseen, predictor)[2]
    assert finding.check == "choice of checkpoint"
    assert "chosen, as the best of its run, by" in finding.message
    predictor.manifest = plain | {"snapshot": {"name": "gone", "id": "x"}}
    with pytest.raises(InputRefused, match="nobody can tell which cells it saw"):
        pretrained(predictor, study, other)


def test_the_commands_audit_and_judge(
    lake: str,
    mosaic: str,
    trained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    place = ("--lake", lake, "--snapshot", "s")
    code, out = said("audit", trained, *place, "--json")
    assert (code, json.loads(out)["findings"]) == (0, [])
    code, out = said("audit", trained, *place, "--set", "by=donor_id", "--json")
    assert code == 8
    assert {one["check"] for one in json.loads(out)["findings"]} == {"pretraining"}
    code, out = said(
        "eval", trained, *place, "--suite", "annotate", "--seeds", "1", "--output", str(tmp_path), "--json"
    )
    assert code == 0
    assert "NaN" not in out
    assert Path(json.loads(out)["report"]).exists()
    monkeypatch.setattr("train.evaluation.gated.FlowSettings", lambda: FlowSettings(steps=20))
    code, out = said("head", str(tmp_path / "head"), *place, "--context", "tissue", "--json")
    assert code == 0
    assert json.loads(out)["gate"]["baseline"]
    study = read_study(open_snapshot(lake, "s"))
    control = study.take(study.label("perturbation") == "control")
    head = load_head(tmp_path / "head")
    delta_G = head.predict(control, "unheard", control.label("tissue")[0])
    assert delta_G.shape == (len(control.features["RNA"]),)
    assert said("head", str(tmp_path / "head"), *place)[0] == 6
    assert said("eval", *place, "--suite", "dance")[0] == 2
    assert json.loads(said("audit", "--lake", mosaic, "--snapshot", "tags", "--json")[1])["cells"] == 300
    own = ("--lake", mosaic, "--snapshot", "s", "--suite", "annotate", "--seeds", "1", "--output", str(tmp_path))
    assert said("eval", *own)[0] == 0
    assert "300 cells are left out: RNA was not measured of them" in (tmp_path / "evaluation.html").read_text()
    assert said("eval", *place, "--suite", "translate")[0] == 2, "RNA from itself"
    asked = ("--sets", "go.gmt", "--set", "by=split", "--set", "knowledge_until=2020-01-01")
    assert said("eval", *place, "--suite", "perturb", *asked)[0] == 8, "nobody knows the day of go.gmt"
    code, out = said("audit", *place, *asked, "--json")
    assert (code, [one["check"] for one in json.loads(out)["findings"]]) == (8, ["knowledge"])
    code, out = said("audit", *place, *asked, "--set", 'days={"go.gmt" = 2019-12-31}', "--json")
    assert (code, json.loads(out)["findings"]) == (0, [])
    assert said("audit", *place, *asked, "--set", 'days={"other.gmt" = 2019-12-31}')[0] == 2, "no file of --sets"
    assert said("eval", "--lake", lake)[0] == 2
    assert said("eval", *place, "--set", "bye=donor_id")[0] == 3


@pytest.mark.parametrize("r", [None, 0.7, 5.0])
def test_expected_logs_are_those_of_drawn_counts(r: float | None) -> None:
    rng, share, depth = np.random.default_rng(0), np.array([[1e-6, 1e-3, 0.01, 0.9]]), 1000.0
    rate = depth * share if r is None else depth * share * rng.gamma(r, 1 / r, (200_000, 4))
    drawn = np.log1p(1e4 * rng.poisson(np.broadcast_to(rate, (200_000, 4))) / depth).mean(axis=0)
    found = expected_logs(share, depth, None if r is None else np.full(4, r))[0]
    np.testing.assert_allclose(found, drawn, rtol=0.04, atol=0.01)
