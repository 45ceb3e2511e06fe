"""A run that adapts a checkpoint: the base stays, the adapter learns, goes on where it stopped, and is small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoded import add_dataset
from safetensors.torch import load_file
from test_train_loop import lake, losses, settings  # noqa: F401  (lake is a fixture)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from store.errors import InputRefused, SettingsError, UsageError
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot
from store.writer import LakeWriter
from train.__main__ import app
from train.adapter import AdapterSettings, load_adapter, save_adapter
from train.arithmetic import operations
from train.cells import with_absent
from train.checkpoint import load, sha256
from train.estimate import plan
from train.evaluation.folds import FoldSettings
from train.evaluation.judge import Question, judge
from train.evaluation.ours import pretrained
from train.evaluation.study import read_study
from train.loop import Run
from train.pretrained import from_pretrained, save_pretrained
from train.settings import RunSettings


@pytest.fixture(scope="module")
def base(lake: str, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    output = tmp_path_factory.mktemp("base")
    create_snapshot(lake, "second", SnapshotSettings(seed=5, where="dataset_id == 'second'", like="s"))
    create_snapshot(lake, "other", SnapshotSettings(seed=5, where="dataset_id == 'first'"))
    return Run(settings(lake, output, steps=30), 1).train().checkpoint


def adapting(lake: str, output: Path, base: str, **changes: object) -> RunSettings:  # noqa: F811
    usual: dict[str, object] = {"snapshot": "second", "steps": 24, "optim": {"warmup_steps": 2, "lr": 0.02}}
    told = settings(lake, output, **(usual | changes))
    values = told.model_dump(exclude={"model"})
    return parse_settings(RunSettings, values | {"adapter": {"base": base, "rank": 4}}, where="test")


def test_an_adapter_learns_what_is_new_and_the_base_stays(lake: str, base: str, tmp_path: Path) -> None:  # noqa: F811
    before = sha256(Path(base) / "model.safetensors")
    summary = Run(adapting(lake, tmp_path, base), 1).train()
    assert summary.loss_test < summary.loss_test_first - 0.01
    assert sha256(Path(base) / "model.safetensors") == before
    assert summary.checkpoint == str(tmp_path / "run/adapter")
    loaded = load(base)
    grown = load_adapter(summary.checkpoint, loaded.model, loaded.manifest)
    weights = load_file(Path(base) / "model.safetensors")
    trunk = {key.replace(".base_layer.", "."): part for key, part in grown.state_dict().items() if "lora_" not in key}
    assert all(torch.equal(trunk[name], weights[name]) for name in weights)
    manifest = json.loads((tmp_path / "run/adapter/manifest.json").read_text())
    assert manifest["snapshot"]["name"] == "second"
    assert manifest["figures"]["loss_test"] == summary.loss_test


def test_an_adapter_is_judged_by_cells_that_neither_it_nor_its_base_saw(
    lake: str,  # noqa: F811
    base: str,
    tmp_path: Path,
) -> None:
    made = Run(adapting(lake, tmp_path, base, steps=4), 1).train().checkpoint
    snapshot = open_snapshot(lake, "second")
    study = read_study(snapshot)
    moved = from_pretrained(base, adapter=made)
    merged = from_pretrained(save_pretrained(moved, tmp_path / "merged"))
    own_C, of_base_C = study.label("split") == "train", pretrained(from_pretrained(base), study, snapshot)
    assert (own_C & ~of_base_C).any()
    for predictor in (moved, merged):
        assert (pretrained(predictor, study, snapshot) == own_C | of_base_C).all()
    unsaid = save_adapter(tmp_path / "unsaid", moved.model, AdapterSettings(4), moved.manifest)
    with pytest.raises(InputRefused, match="the adapter does not say what it learned from"):
        pretrained(from_pretrained(base, adapter=unsaid), study, snapshot)
    words = ["--lake", lake, "--snapshot", "second", "--adapter", made, "--set", "by=split"]
    told = CliRunner().invoke(app, ["audit", base, *words, "--set", 'held=["train"]', "--json"])
    leak = next(one for one in json.loads(told.stdout)["findings"] if one["check"] == "pretraining")
    assert f"{own_C.sum():,} " in leak["message"], leak
    missing = CliRunner().invoke(app, ["eval", *words])
    assert "name the checkpoint that it belongs to" in str(missing.exception)
    members = Question("annotate", lake, "second", FoldSettings(by="split", held=("test",)), members=2)
    with pytest.raises(UsageError, match="leave out --adapter"):
        judge(members, base, adapter=made)


def test_an_adapting_run_goes_on_bit_for_bit_and_is_done_once(
    lake: str,  # noqa: F811
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Run(adapting(lake, tmp_path / "whole", base), 1).train()
    step = Run._one

    def dies(self: Run, cells: object) -> dict[str, float]:
        if self.step == 10:
            raise KeyboardInterrupt
        return step(self, cells)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_one", dies)
        with pytest.raises(KeyboardInterrupt):
            Run(adapting(lake, tmp_path / "broken", base), 1).train()
    run = Run(adapting(lake, tmp_path / "broken", base), 1)
    assert run.resumed_from == 8
    run.train()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "run/adapter/adapter.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    from train.launch import launch  # a finished run needs no cluster

    assert launch(adapting(lake, tmp_path / "whole", base)).checkpoint == str(tmp_path / "whole/run/adapter")


def test_the_best_adapter_is_kept_beside_the_last(
    lake: str,  # noqa: F811
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = iter([9.0, 3.0, 1.0, 2.0, 2.0])  # before, after 4, 8 and 12 steps, at the end
    monkeypatch.setattr(Run, "evaluate", lambda self: next(told))
    Run(adapting(lake, tmp_path, base, steps=12, evaluate_every=4, keep_best=True), 1).train()
    last, best = (
        json.loads((tmp_path / f"run/{one}/manifest.json").read_text()) for one in ("adapter", "adapter-best")
    )
    assert (last["global_step"], last["figures"]["loss_test"]) == (12, 2.0)
    assert (best["global_step"], best["figures"]["loss_test"]) == (8, 1.0)
    loaded = load(base)
    load_adapter(tmp_path / "run/adapter-best", loaded.model, loaded.manifest)


def test_what_adapting_takes_is_told_before(lake: str, base: str, tmp_path: Path) -> None:  # noqa: F811
    told = adapting(lake, tmp_path, base)
    run = Run(told, 1)
    found = plan(told)
    learn = sum(part.numel() for part in run.plain.parameters() if part.requires_grad)
    assert found.parameters.learn == learn < found.parameters.all == run.parameters
    assert found.memory.gradients == 4 * learn
    assert found.memory.moments == 2 * found.memory.gradients
    run.train()
    size = (tmp_path / "run/adapter/adapter.safetensors").stat().st_size
    assert found.checkpoint_bytes == pytest.approx(size, rel=0.5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # other backends are not counted
        batch = run.objective.prepare(run.plain, with_absent(next(run.stream.steps(0, 1)), run.absent), 0)
        torch.autograd.backward(run.objective.loss(run.plain, run.plain, batch).total)
    assert operations(run.plain, batch.seen) == pytest.approx(counter.get_total_flops(), rel=0.25)  # it counts padding
    assert plan(told, "cpu").seconds_per_step > 0


def test_features_behind_those_of_the_base_change_nothing(lake: str, base: str, tmp_path: Path) -> None:  # noqa: F811
    with LakeWriter(lake) as writer:
        add_dataset(writer, "third", 80, {"RNA": 75})
    told = SnapshotSettings(seed=5, where="dataset_id == 'third'", like="s")
    wide, known = create_snapshot(lake, "wide", told), {"RNA": tuple(load(base).vocabulary["RNA"].feature_id)}
    create_snapshot(lake, "narrow", told.model_copy(update={"features": known}))
    n_features = len(wide.vocabulary("RNA"))
    assert (n_features, len(known["RNA"])) == (75, 60)
    data = {"global_batch": 24, "block": 64, "window": 2, "matched_controls": 1.0}
    for name in ("wide", "narrow"):
        Run(adapting(lake, tmp_path / name, base, snapshot=name, steps=4, data=data), 1).train()
    assert losses(tmp_path / "wide") == losses(tmp_path / "narrow")
    one, other = (load_file(tmp_path / name / "run/adapter/adapter.safetensors") for name in ("wide", "narrow"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    said = plan(adapting(lake, tmp_path, base, snapshot="wide"), "cpu").warnings
    assert any("15 features of RNA come after those of" in one for one in said)
    assert not any("come after" in one for one in plan(adapting(lake, tmp_path, base, snapshot="narrow")).warnings)


def test_another_organisms_features_of_the_same_ids_are_refused(base: str, tmp_path: Path) -> None:
    uri, known = str(tmp_path / "lake"), load(base).vocabulary["RNA"].feature_id
    with LakeWriter(uri) as writer:
        add_dataset(writer, "mice", 80, {"RNA": len(known)}, organism="mus_musculus")
    assert create_snapshot(uri, "mice", SnapshotSettings()).vocabulary("RNA")["feature_id"].to_pylist() == known
    with pytest.raises(UsageError, match=r"its RNA features are not those of"):
        Run(adapting(uri, tmp_path, base, snapshot="mice"), 1)


def test_other_features_and_settings_of_a_model_are_refused(lake: str, base: str, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match=r"features are not those of .*make the snapshot with --set like=s"):
        Run(adapting(lake, tmp_path, base, snapshot="other"), 1)
    with pytest.raises(UsageError, match=r"data.tokens = 77: an adapter learns with the tokens with which it answers"):
        Run(adapting(lake, tmp_path, base, data={"tokens": 77}), 1)
    with pytest.raises(SettingsError, match=r"leave out \[model\] and \[knowledge\]"):
        parse_settings(RunSettings, {"snapshot": "s", "adapter": {"base": "x"}, "model": {"width": 16}}, where="t")
    with pytest.raises(SettingsError, match="parallel='ddp'"):
        parse_settings(RunSettings, {"snapshot": "s", "adapter": {"base": "x"}, "parallel": "fsdp"}, where="t")
