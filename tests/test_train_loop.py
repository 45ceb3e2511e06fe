"""The loop: learns, resumes bit for bit, gives the same gradients on two workers, and says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from encoded import add_dataset
from safetensors.torch import load_file

from ingest.simulate import SimulationSettings, simulate
from store.errors import (
    ConflictError,
    InterruptedRun,
    MissingError,
    SettingsError,
    StorageError,
    UsageError,
    VerificationError,
)
from store.schema import DatasetPlan, Features
from store.settings import load_settings, parse_settings
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot
from store.writer import LakeWriter, write_counts
from train.loop import Run
from train.predictor import Predictor
from train.record import read_metrics
from train.schedule import learning_rate
from train.settings import RunSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 150, {"RNA": 40, "protein": 6})
        add_dataset(writer, "second", 90, {"RNA": 60})
    create_snapshot(uri, "s", SnapshotSettings(seed=2))
    return uri


def settings(lake: str, output: Path, **changes: object) -> RunSettings:
    values = {
        "lake": lake,
        "snapshot": "s",
        "output": str(output),
        "steps": 12,
        "workers": 1,
        "checkpoint_every": 4,
        "trackers": [],
        "report": False,
        "model": {"width": 16, "layers": 1, "heads": 2},
        "data": {"global_batch": 24, "block": 64, "window": 2, "tokens": 32},
        "optim": {"warmup_steps": 2, "lr": 0.003},
    }
    return parse_settings(RunSettings, values | changes, where="test")


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "run/metrics.jsonl")]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "run/checkpoint/model.safetensors")


def test_a_run_learns_and_leaves_metrics_a_card_and_a_checkpoint(lake: str, tmp_path: Path) -> None:
    told = {"report": True, "trackers": ["tensorboard"]}
    summary = Run(settings(lake, tmp_path, steps=60, **told), 1).train()
    assert summary.loss_test < summary.loss_test_first
    assert (tmp_path / "run/report.html").exists()
    assert list((tmp_path / "run/tensorboard").rglob("events.out.tfevents.*"))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert {"data_wait_s", "forward_backward_s", "optimizer_s", "tokens", "grad_norm"} <= set(rows[0])
    predictor = Predictor.load(summary.checkpoint)
    assert predictor.manifest["global_step"] == 60
    assert predictor.reference is not None
    n_cells = open_snapshot(lake, "s").manifest["splits"]
    assert (len(predictor.reference.embedding_RD), len(predictor.reference.distance_N)) == (
        n_cells["train"],
        n_cells["test"],
    )
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    assert f"{summary.loss_test:.4f}" in card
    assert json.loads((tmp_path / "run/settings.json").read_text())["steps"] == 60


@pytest.fixture(scope="module")
def whole(lake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of 12 steps lies that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    Run(settings(lake, output), 1).train()
    return output


class Scaled(Accelerator):
    """Scales losses as with fp16 on a GPU, and from so far up that the first steps are left out."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=3)

    def unscale_gradients(self, optimizer: object = None) -> None:
        for one in self._optimizers:
            self.scaler.unscale_(one.optimizer)


def test_a_run_whose_losses_are_scaled_resumes_with_the_scale_that_it_had(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr("train.loop.Accelerator", Scaled)
    told = {"precision": "fp16", "steps": 24}
    unbroken = Run(settings(lake, tmp_path / "whole", **told), 1)
    unbroken.train()
    assert unbroken.accelerator.scaler.get_scale() < 2.0**126
    stopped(settings(lake, tmp_path / "broken", **told), 18, monkeypatch)
    resumed = Run(settings(lake, tmp_path / "broken", **told), 1)
    assert resumed.resumed_from == 16
    assert resumed.accelerator.scaler.get_scale() < 2.0**126
    resumed.train()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    AcceleratorState._reset_state(True)


def stopped(told: RunSettings, stop: int, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a run that was stopped before a step."""
    step = Run._one

    def dies(self: Run, cells: object) -> dict[str, float]:
        if self.step == stop:
            raise KeyboardInterrupt
        return step(self, cells)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_one", dies)
        run = Run(told, 1)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    return run


@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(
    lake: str, whole: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(settings(lake, tmp_path / "broken"), stop, monkeypatch)
    run = Run(settings(lake, tmp_path / "broken"), 1)
    assert run.resumed_from == stop // 4 * 4
    run.train()
    assert losses(tmp_path / "broken") == losses(whole)
    first, second = weights(whole), weights(tmp_path / "broken")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_metrics_line_that_was_cut_off_does_not_stop_a_resume(lake: str, tmp_path: Path) -> None:
    Run(settings(lake, tmp_path, steps=8), 1).train()
    with (tmp_path / "run/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "lo')
    Run(settings(lake, tmp_path), 1).train()
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 13))


def test_what_was_not_measured_is_null_in_json_and_no_number_in_python(lake: str, tmp_path: Path) -> None:
    data = {"global_batch": 24, "tokens": 32, "test_split": ""}
    summary = Run(settings(lake, tmp_path, data=data), 1).train()
    assert np.isnan(summary.loss_test)
    for name in ("summary.json", "start.json", "checkpoint/manifest.json"):
        text = (tmp_path / "run" / name).read_text()
        assert "NaN" not in text
        assert '"loss_test": null' in text


def test_other_settings_under_the_same_name_are_refused(lake: str, tmp_path: Path) -> None:
    Run(settings(lake, tmp_path), 1).train()
    assert not (tmp_path / "run/report.html").exists(), "none was asked for"
    with pytest.raises(ConflictError, match=r"begun with other settings \(seed = 9, it was 0\); choose another name"):
        Run(settings(lake, tmp_path, seed=9), 1)
    with pytest.raises(ConflictError, match=r"\(optim\.lr = 0\.1, it was 0\.003\)"):
        Run(settings(lake, tmp_path, optim={"warmup_steps": 2, "lr": 0.1}), 1)
    assert Run(settings(lake, tmp_path, steps=14), 1).resumed_from == 12


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_cells(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(settings(lake, tmp_path), 1)
    with torch.no_grad():
        run.plain.summary.fill_(torch.nan)
    monkeypatch.setattr(run, "evaluate", lambda: 0.0)
    with pytest.raises(VerificationError, match=r"step 0: the loss is nan; rows \["):
        run.train()


def test_a_world_that_accelerate_does_not_see_is_refused(lake: str, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="Accelerate sees 1 processes and the launcher started 2"):
        Run(settings(lake, tmp_path), 2)


def test_the_rate_warms_up_and_decays_to_a_tenth(lake: str, tmp_path: Path) -> None:
    run = settings(lake, tmp_path, steps=100, optim={"lr": 1.0, "warmup_steps": 10})
    rates = [learning_rate(run, step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_bad_settings_are_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="warmup_steps=1000 never ends: steps=300"):
        parse_settings(RunSettings, {"snapshot": "s", "optim": {"warmup_steps": 1000}}, where="t")
    with pytest.raises(SettingsError, match=r"unknown key 'optim.lrr'; did you mean 'lr'"):
        parse_settings(RunSettings, {"snapshot": "s", "optim": {"lrr": 1}}, where="t")
    with pytest.raises(SettingsError, match="heads=3 does not divide width=64"):
        parse_settings(RunSettings, {"snapshot": "s", "model": {"heads": 3}}, where="t")
    for name, value in (("lr", "inf"), ("clip_norm", "inf"), ("weight_decay", "nan")):
        with pytest.raises(SettingsError, match=rf"optim\.{name}: Input should be a finite number"):
            load_settings(RunSettings, None, ["snapshot=s", f"optim.{name}={value}"])
    parse_settings(RunSettings, {"snapshot": "s", "seed": 2**32 - 1}, where="t")
    with pytest.raises(SettingsError, match="seed: Input should be less than 4294967296"):
        parse_settings(RunSettings, {"snapshot": "s", "seed": 2**32}, where="t")
    with pytest.raises(SettingsError, match="precision='fp16' needs a GPU"):
        parse_settings(RunSettings, {"snapshot": "s", "precision": "fp16", "device": "cpu"}, where="t")
    with pytest.raises(MissingError, match="no such settings file"):
        load_settings(RunSettings, tmp_path / "none.toml")


def test_half_precision_is_refused_where_nothing_would_come_of_it(lake: str, tmp_path: Path) -> None:
    from train.launch import on_gpus

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    AcceleratorState._reset_state(True)
    for start in (lambda told: Run(told, 1), on_gpus):
        with pytest.raises(UsageError, match=r"precision = 'fp16' needs a GPU.*'bf16'"):
            start(settings(lake, tmp_path, precision="fp16"))
    AcceleratorState._reset_state(True)


def test_a_name_is_that_of_a_folder() -> None:
    for name in ("a", "plain run 2", "Läufe", "<b>x&y", "a.b", "-"):
        assert parse_settings(RunSettings, {"snapshot": "s", "name": name}, where="t").name == name
    for name in ("", ".", "..", "/tmp/x", "a/b", "a\nb", "a\0", "x" * 201, "ä" * 101):
        with pytest.raises(SettingsError, match="name: Value error, is the name of a folder in output"):
            parse_settings(RunSettings, {"snapshot": "s", "name": name}, where="t")


RECIPES = sorted(str(path.relative_to(ROOT / "infra/runs")) for path in (ROOT / "infra/runs").rglob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_says_how_to_run_it_on_what(recipe: str) -> None:
    settings = load_settings(RunSettings, ROOT / "infra/runs" / recipe)
    assert settings.data.window % settings.data.lanes == 0 or settings.data.lanes == 1
    head = (ROOT / "infra/runs" / recipe).read_text().splitlines()[:2]
    assert head[0].startswith(f"# python -m train infra/runs/{recipe}")
    assert head[1].startswith("# Hardware: ")


def test_the_laptop_recipe_keeps_its_golden_curve(tmp_path: Path) -> None:
    made = simulate(SimulationSettings(cells=600, seed=3))
    names = {"RNA": made.truth.genes, "protein": made.truth.proteins, "ATAC": made.truth.peaks}
    features = {name: Features(ids, ids, ["x"] * len(ids), [0] * len(ids)) for name, ids in names.items()}
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        reservation = writer.reserve(DatasetPlan("sim", "synthetic_construct", "k", 600, features))
        writer.commit(reservation, made.obs, [write_counts(reservation, name, 0, made.counts[name]) for name in names])
    create_snapshot(uri, "s", SnapshotSettings())
    words = [f'lake="{uri}"', "snapshot=s", f'output="{tmp_path}"', "workers=1", "steps=25"]
    told = load_settings(RunSettings, ROOT / "infra/runs/laptop.toml", words)
    Run(told, 1).train()
    found = [row["loss"] for row in read_metrics(tmp_path / "laptop/metrics.jsonl")]
    golden = json.loads((ROOT / "tests/golden/laptop.json").read_text())
    np.testing.assert_allclose(found, golden["loss"], rtol=2e-3)


def test_a_second_driver_of_a_run_is_refused_and_a_killed_one_is_passed_at_once(lake: str, tmp_path: Path) -> None:
    from train.launch import alone, launch

    told = settings(lake, tmp_path)
    code = """if True:
        import pathlib, sys
        from train.launch import alone
        with alone(pathlib.Path(sys.argv[1])):
            print(flush=True)
            input()
    """
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConflictError, match=rf"run: the run is being written by process {other.pid} on"):
            launch(told)
        assert not (tmp_path / "run/state").exists()
    finally:
        other.kill()
        other.communicate()
    begin = time.monotonic()
    for _ in range(2):
        with alone(tmp_path / "run"):
            pass
    assert time.monotonic() - begin < 5


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # ray, sockets of its own at shutdown
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ray, of its own use of others
@pytest.mark.filterwarnings("ignore::FutureWarning")  # ray, announcing its next version
def test_two_workers_take_the_same_steps_as_one_and_a_finished_run_is_not_run_again(
    lake: str, tmp_path: Path, ray_cluster: None
) -> None:
    from train.launch import launch

    n_cells = open_snapshot(lake, "s").manifest["splits"]["train"]
    lonely = next(size for size in range(20, n_cells) if n_cells % size == 1)  # an epoch ends on a batch of one cell
    data = {"global_batch": lonely, "block": 64, "window": 2, "tokens": 32}
    assert n_cells // lonely < 12
    Run(settings(lake, tmp_path / "one", data=data), 1).train()
    steps: list[int] = []
    two = settings(lake, tmp_path / "two", workers=2, data=data)
    summary = launch(two, lambda step, loss: steps.append(step))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    assert steps[-1] == 12
    assert launch(two) == summary
    with pytest.raises(ConflictError, match="begun with other settings"):
        launch(two.model_copy(update={"seed": 9}))
    with pytest.raises(UsageError, match="no cell is in split 'validation'"):
        launch(settings(lake, tmp_path / "three", data={"split": "validation"}))
    with pytest.raises(MissingError, match=r"no snapshot 'none'"):
        launch(settings(lake, tmp_path / "three", snapshot="none"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # ray, at its imports and stop
@pytest.mark.filterwarnings("ignore::FutureWarning")  # ray, announcing its next version
def test_a_cluster_without_room_is_said_and_ends_the_run(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import launch

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "4")
    monkeypatch.setattr(launch, "STALLED_S", 1.0)
    said: list[str] = []
    words = "the cluster has 2 CPUs and the run needs 3: start more nodes"
    with pytest.raises(StorageError, match=f"could not be started within 8 s: {words}"):
        launch.launch(settings(lake, tmp_path, workers=3, patience_s=8), tell=said.append)
    assert said
    assert all(one.startswith(words) for one in said)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # ray, at its imports and stop
@pytest.mark.filterwarnings("ignore::FutureWarning")  # ray, announcing its next version
def test_a_run_that_is_ended_says_where_it_goes_on_and_a_full_disk_or_a_store_that_fails_is_no_bug(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.torch import TorchTrainer

    from train.launch import launch

    class Failed(Exception):
        worker_failures: ClassVar[dict[int, OSError]] = {0: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}

    def terminated(trainer: TorchTrainer) -> None:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(1))  # as Ray Train does
        signal.raise_signal(signal.SIGTERM)

    def full(trainer: TorchTrainer) -> None:
        raise Failed

    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    Run(settings(lake, tmp_path, steps=8), 1).train()
    monkeypatch.setattr(TorchTrainer, "fit", terminated)
    with pytest.raises(InterruptedRun, match="stopped; the same command goes on from step 8, the last saved"):
        launch(settings(lake, tmp_path))
    with pytest.raises(InterruptedRun, match="goes on from its start"):
        launch(settings(lake, tmp_path / "other"))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.setattr(TorchTrainer, "fit", full)
    with pytest.raises(StorageError, match=r"run: .*No space left on device; free some space"):
        launch(settings(lake, tmp_path))
    Failed.worker_failures[0] = StorageError("s3://lake/snapshots/s/RNA/counts: cannot be read")
    with pytest.raises(StorageError, match="counts: cannot be read; the same command goes on from step 8, the last"):
        launch(settings(lake, tmp_path))


@pytest.mark.road
def test_training_recovers_the_knock_outs_of_simulated_cells(tmp_path: Path) -> None:
    made = simulate(SimulationSettings(cells=2400))
    names = {"RNA": made.truth.genes, "protein": made.truth.proteins, "ATAC": made.truth.peaks}
    features = {name: Features(ids, ids, ["x"] * len(ids), [0] * len(ids)) for name, ids in names.items()}
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        reservation = writer.reserve(DatasetPlan("sim", "synthetic_construct", "k", 2400, features))
        blocks = [write_counts(reservation, name, 0, made.counts[name]) for name in features]
        writer.commit(reservation, made.obs, blocks)
    create_snapshot(uri, "s", SnapshotSettings())
    run = Run(
        parse_settings(
            RunSettings,
            {
                "lake": uri,
                "snapshot": "s",
                "output": str(tmp_path),
                "steps": 200,
                "workers": 1,
                "trackers": [],
                "report": False,
                "model": {"width": 32, "layers": 1, "heads": 2},
                "data": {"tokens": 64},
            },  # one thread: two crawl when the cores are busy
            where="t",
        ),
        1,
    )
    predictor = Predictor.load(run.train().checkpoint)
    control = np.flatnonzero(made.obs["perturbation"] == "control")[:100]
    order = [made.truth.genes.index(name) for name in predictor.vocabulary["RNA"].feature_id]
    everything = {name: [ids.index(f) for f in predictor.vocabulary[name].feature_id] for name, ids in names.items()}
    cells = predictor.cells({name: made.counts[name][control][:, columns] for name, columns in everything.items()})
    sizes, fits = {}, []
    for target, effect in zip(made.truth.targets, made.truth.effect_TG[:, order], strict=True):
        delta = predictor.perturb(cells, [target])["RNA"].delta_G
        sizes[target] = float(np.sqrt(np.mean(delta**2)))
        if effect.any():
            fits.append(np.corrcoef(delta, effect)[0, 1])
    real = [size for target, size in sizes.items() if target not in made.truth.null_targets]
    null = [sizes[target] for target in made.truth.null_targets]
    assert np.median(fits) > 0.7
    assert max(null) < min(real) / 2
