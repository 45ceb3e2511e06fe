"""A run that adapts a checkpoint: the base stays, the adapter learns, goes on where it stopped, and is small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_loop import lake, losses, settings  # noqa: F401  (lake is a fixture)

from store.errors import SettingsError, UsageError
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot
from train.adapter import load_adapter
from train.checkpoint import load, sha256
from train.loop import Run
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


def test_other_features_and_settings_of_a_model_are_refused(lake: str, base: str, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match=r"features are not those of .*make the snapshot with --set like=s"):
        Run(adapting(lake, tmp_path, base, snapshot="other"), 1)
    with pytest.raises(SettingsError, match=r"leave out \[model\] and \[knowledge\]"):
        parse_settings(RunSettings, {"snapshot": "s", "adapter": {"base": "x"}, "model": {"width": 16}}, where="t")
    with pytest.raises(SettingsError, match="parallel='ddp'"):
        parse_settings(RunSettings, {"snapshot": "s", "adapter": {"base": "x"}, "parallel": "fsdp"}, where="t")
