"""Runs that are asked to end: the state is saved at the next step, and whoever asks waits only where that can be."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_loop import lake, losses, settings, weights, whole  # noqa: F401  (two are fixtures)

from store.errors import InterruptedRun
from train.ending import Ending
from train.loop import Run
from train.state import valid_states


def test_a_run_that_is_asked_to_end_saves_at_the_next_step_and_goes_on_bit_for_bit(
    lake: str,  # noqa: F811
    whole: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.ending.LOOKED_S", 0.0)
    told, folder = settings(lake, tmp_path, checkpoint_every=1000), tmp_path / "run"

    def each(row: dict[str, float]) -> None:
        if row["step"] == 6:
            assert Ending(folder).ask()

    run = Run(told, 1)
    assert not Ending(folder).ask()  # no steps are taken
    with pytest.raises(InterruptedRun, match="asked to end after step 7, with its state saved"):
        run.train(each, ending=Ending(folder))
    assert not Ending(folder).ask()
    assert [path.name.split("_")[1] for path in valid_states(folder / "state")] == ["000000007"]
    resumed = Run(told, 1)
    assert resumed.resumed_from == 7
    resumed.train(ending=Ending(folder))
    assert losses(tmp_path) == losses(whole)
    first, second = weights(whole), weights(tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_file_that_cannot_be_written_stops_no_run_and_nobody_waits(tmp_path: Path) -> None:
    ending = Ending(tmp_path / "nowhere")
    with ending.listening():
        assert not ending.ask()
        assert not ending.heard()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # ray, at its imports and stop
@pytest.mark.filterwarnings("ignore::FutureWarning")  # ray, announcing its next version
@pytest.mark.parametrize("then", ["workers end", "asked again", "time is up"])
def test_a_driver_waits_for_the_state_until_it_is_asked_again_or_time_is_up(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: str,
) -> None:
    from ray.train.torch import TorchTrainer

    from train import launch

    came: list[str] = []

    def at_once(*_: object) -> None:
        came.append("at once")
        sys.exit(1)  # as Ray Train does

    def ended(trainer: Any) -> None:
        trainer._register_sigint_handler(None)
        with Ending(tmp_path / "run").listening():
            signal.raise_signal(signal.SIGTERM)
            came.append((tmp_path / "run/ending").read_text())
            if then == "asked again":
                signal.raise_signal(signal.SIGINT)
            elif then == "time is up":
                signal.pause()

    monkeypatch.setattr(launch, "ENDS_S", 0.1 if then == "time is up" else 600.0)
    monkeypatch.setattr(TorchTrainer, "_register_sigint_handler", lambda *_: signal.signal(signal.SIGINT, at_once))
    monkeypatch.setattr(TorchTrainer, "fit", ended)
    said: list[str] = []
    with pytest.raises(InterruptedRun, match="stopped; the same command goes on from its start"):
        launch.launch(settings(lake, tmp_path), tell=said.append)
    assert came == ["end\n"] + ["at once"] * (then != "workers end")
    assert said == ["for the workers to save their state; another Ctrl-C or SIGTERM ends them at once"]
    assert not (tmp_path / "run/ending").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # ray, at its imports and stop
@pytest.mark.filterwarnings("ignore::FutureWarning")  # ray, announcing its next version
def test_a_driver_waits_for_nothing_where_no_steps_are_taken(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train.torch import TorchTrainer

    from train.launch import launch

    def begun(trainer: Any) -> None:
        trainer._register_sigint_handler(None)
        signal.raise_signal(signal.SIGINT)

    (tmp_path / "run").mkdir()
    (tmp_path / "run/ending").write_text("")  # of a worker that was killed
    ends = lambda *_: signal.signal(signal.SIGINT, lambda *_: sys.exit(1))  # noqa: E731
    monkeypatch.setattr(TorchTrainer, "_register_sigint_handler", ends)
    monkeypatch.setattr(TorchTrainer, "fit", begun)
    said: list[str] = []
    with pytest.raises(InterruptedRun, match="goes on from its start"):
        launch(settings(lake, tmp_path), tell=said.append)
    assert said == []
