"""Two processes without Ray: shares, micro batches and shards take the same steps; states move between sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import recorded, rows_of, together
from safetensors.torch import load_file
from test_train_loop import lake, losses, settings  # noqa: F401  (lake is a fixture)

from store.errors import SettingsError, UsageError
from store.settings import parse_settings
from train.loop import Run, n_parts
from train.record import read_metrics
from train.schedule import learning_rate
from train.settings import RunSettings
from train.state import valid_states

DATA = {"global_batch": 24, "block": 64, "window": 2, "tokens": 32}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "run/checkpoint/model.safetensors")


def assert_close(one: Path, other: Path) -> None:
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-4)
    first, second = weights(one), weights(other)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-4, msg=name)


MOVING = {"parallel": "fsdp", "optim": {"warmup_steps": 2, "lr": 0.003, "schedule": "wsd", "decay_share": 1.0}}
STEADY = {"warmup_steps": 2, "lr": 0.003, "schedule": "wsd", "decay_share": 0.01}
"""The same rate whatever the steps."""


@pytest.fixture(scope="module")
def by_two(lake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Where runs of two processes lie, which start once for all of them."""
    output = tmp_path_factory.mktemp("two")

    def job(name: str, **changes: object) -> RunSettings:
        return settings(lake, output / name, **changes)

    jobs = [
        job("shares"),
        job("micro", data=DATA | {"micro_batch": 5}),
        job("shards", parallel="fsdp", data=DATA | {"micro_batch": 7}),
        job("whole", **MOVING),
        job("moved", **MOVING, steps=12),
        job("grows", steps=5, optim=STEADY),
    ]
    assert together(2, jobs) == [0] * len(jobs)
    return output


def test_shares_micro_batches_and_shards_take_the_same_steps_and_states_move_from_two_to_one_to_two(
    lake: str,  # noqa: F811
    by_two: Path,
    tmp_path: Path,
) -> None:
    Run(settings(lake, tmp_path / "alone"), 1).train()
    Run(settings(lake, tmp_path / "micro alone", data=DATA | {"micro_batch": 5}, recompute=True), 1).train()
    for other in (tmp_path / "micro alone", by_two / "shares", by_two / "micro", by_two / "shards"):
        assert_close(tmp_path / "alone", other)
    moved = settings(lake, by_two / "moved", **MOVING)
    state = valid_states(by_two / "moved/run/state")
    assert [path.name[:14] for path in state] == ["step_000000008", "step_000000012"]
    for path in state[-1:]:  # stop it at 8, go on alone to 10, and on two again to the end
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    # the schedule counts all steps, so the last ones are taken by the same settings
    alone = Run(moved, 1)
    assert alone.resumed_from == 8
    alone.train()
    assert_close(by_two / "whole", by_two / "moved")
    for path in valid_states(by_two / "moved/run/state")[-1:]:
        (path / "manifest.json").unlink()
    assert together(2, [moved]) == [8]
    assert_close(by_two / "whole", by_two / "moved")


def test_a_run_goes_on_with_one_worker_and_then_with_three_over_the_same_cells(
    lake: str,  # noqa: F811
    by_two: Path,
    tmp_path: Path,
) -> None:
    whole = Run(settings(lake, tmp_path / "whole", steps=15, optim=STEADY), 1)
    recorded(whole)
    whole.train()
    alone = Run(settings(lake, by_two / "grows", steps=10, optim=STEADY), 1)
    recorded(alone)
    alone.train()
    resumed = [alone.resumed_from, *together(3, [settings(lake, by_two / "grows", steps=15, optim=STEADY)])]
    assert resumed == [5, 10]
    first, second = rows_of(tmp_path / "whole/run"), rows_of(by_two / "grows/run")
    assert sorted(first) == list(range(15))
    assert first == second
    assert_close(tmp_path / "whole", by_two / "grows")


def test_every_rank_takes_as_many_parts() -> None:
    assert n_parts(0, 100, 3) == 1
    assert n_parts(10, 100, 3) == 4  # shares of 34 and 33
    assert n_parts(64, 100, 3) == 1


def test_wsd_stays_at_the_peak_and_ends_at_nothing(lake: str, tmp_path: Path) -> None:  # noqa: F811
    optim = {"lr": 1.0, "warmup_steps": 10, "schedule": "wsd", "decay_share": 0.2}
    run = settings(lake, tmp_path, steps=100, optim=optim)
    rates = [learning_rate(run, step) for step in range(101)]
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0


def test_the_best_state_is_exported_beside_the_last(lake: str, tmp_path: Path) -> None:  # noqa: F811
    optim = {"warmup_steps": 2, "lr": 0.5}  # so high that it gets worse
    run = settings(lake, tmp_path, evaluate_every=4, keep_best=True, optim=optim)
    Run(run, 1).train()
    rows = {row["step"]: row["loss_test"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss_test" in row}
    assert list(rows) == [4, 8, 12]
    best = min(rows, key=lambda step: rows[step])
    from train.checkpoint import load

    chosen, last = (load(tmp_path / "run" / name).manifest for name in ("checkpoint-best", "checkpoint"))
    assert (chosen["global_step"], last["global_step"]) == (best, 12)
    assert chosen["chosen"] == {"split": "test", "of": 3}
    assert "chosen" not in last
    assert (chosen["figures"]["steps"], last["figures"]["steps"]) == (best, 12)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert chosen["figures"]["loss_last"] == pytest.approx(np.mean(losses[:best]))
    assert chosen["figures"]["loss_test"] == pytest.approx(rows[best])
    cards = [(tmp_path / "run" / name / "README.md").read_text() for name in ("checkpoint-best", "checkpoint")]
    assert "split `test`, the lowest of 3 looks" in cards[0]
    assert "These weights were chosen by that split" in cards[0]
    assert "model-index" not in cards[0], "what chose is no measure"
    assert "split `test`, after training" in cards[1]
    assert "model-index" in cards[1]


def test_a_state_carries_the_loss_of_its_own_weights_or_none(lake: str, tmp_path: Path) -> None:  # noqa: F811
    run = settings(lake, tmp_path, evaluate_every=3, checkpoint_every=4, keep_best=True, keep_last=9)
    Run(run, 1).train()
    rows = {row["step"]: row["loss_test"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss_test" in row}
    said = {
        manifest["global_step"]: manifest["loss_test"]
        for path in valid_states(tmp_path / "run/state")
        for manifest in [json.loads((path / "manifest.json").read_text())]
    }
    assert list(said) == [3, 4, 6, 8, 9, 12]
    assert said == {step: rows.get(step) for step in said}


def test_a_warned_process_saves_at_once(lake: str, tmp_path: Path) -> None:  # noqa: F811
    asked: list[int] = []
    run = Run(settings(lake, tmp_path, steps=35, checkpoint_every=100, keep_last=5), 1)

    def warned() -> bool:
        asked.append(run.step)
        return run.step >= 20

    run.train(warned=warned)
    assert asked == [10, 20, 30]
    assert [int(path.name.split("_")[1]) for path in valid_states(tmp_path / "run/state")] == [20, 35]


def test_settings_that_do_not_go_together_are_refused() -> None:
    for values, message in (
        ({"output": "s3://bucket/runs"}, "output='s3://bucket/runs': runs are written to a folder"),
        ({"workers": 2, "workers_min": 3}, "workers_min=3 is more than workers=2"),
        ({"keep_best": True}, "keep_best: say how often to evaluate"),
        ({"keep_best": True, "evaluate_every": 301}, "evaluate_every=301 never comes, for steps=300"),
        ({"evaluate_every": 9, "data": {"test_split": ""}}, "evaluate_every=9: say on which split"),
        ({"data": {"split": "test"}}, "test_split='test' is the split that is trained on"),
        ({"knowledge": {"permute": True}}, "permute=true deals no membership: name files in sets"),
        ({"knowledge": {"smallest": 50, "largest": 20}}, "smallest=50 is above largest=20: no set would be taken"),
        ({"parallel": "fsdp", "precision": "fp16"}, "does not go with parallel='fsdp'"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse_settings(RunSettings, {"snapshot": "s"} | values, where="t")
    parse_settings(RunSettings, {"snapshot": "s", "keep_best": True, "evaluate_every": 300}, where="t")
    parse_settings(RunSettings, {"snapshot": "s", "knowledge": {"permute": True, "sets": ["s.gmt"]}}, where="t")


def test_evaluating_on_a_split_without_cells_is_refused_before_any_step(lake: str, tmp_path: Path) -> None:  # noqa: F811
    data = DATA | {"test_split": "held"}
    message = r"no cell is in split 'held' \(data\.test_split\), which evaluate_every=4 asks for.* cells: test, train;"
    run = settings(lake, tmp_path, evaluate_every=4, data=data)
    with pytest.raises(UsageError, match=message):
        Run(run, 1)
    from train.launch import launch

    with pytest.raises(UsageError, match=message):
        launch(run)
    with pytest.raises(UsageError, match=r"no cell is in split 'held' \(data\.test_split\); splits with cells: test"):
        Run(settings(lake, tmp_path, data=data), 1)
