"""What a run shows to Prometheus: goodput over restarts, the lag of states, and gauges that Ray would forget."""

from __future__ import annotations

import time
from typing import Any

import pytest

from store import cluster
from store.cluster import RayMetrics
from train import gauges
from train.gauges import Gauges
from train.record import PARTS
from train.settings import RunSettings


class Told:
    """Stands for RayMetrics; keeps the last value of each series."""

    def __init__(self, table: object) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        self.values[(name.removeprefix("somaflow_train_"), *labels.values())] = value

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        key = (name.removeprefix("somaflow_train_"), *labels.values())
        if number > 0:
            self.values[key] = self.values.get(key, 0.0) + number

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "RayMetrics", Told)


def row(step: int, ended: float, **values: float) -> dict[str, float]:
    """A step of 10 s, 6 of which it learned."""
    seconds = dict(zip(PARTS, (3.0, 1.0, 4.0, 1.0, 1.0), strict=True))
    return {"step": step, "time": ended, "cells": 8.0, "tokens": 80.0, "operations": 5.0} | seconds | values


def shown(made: Gauges) -> Any:
    return {key[0] if len(key) == 2 else key: value for key, value in made.metrics.values.items()}  # type: ignore[attr-defined]


def test_goodput_counts_what_a_restart_threw_away_and_the_time_until_it_went_on() -> None:
    made = Gauges(RunSettings(snapshot="s"), kept=[row(1, 1010.0), row(2, 1020.0)])
    made.show(row(3, 1100.0))
    assert shown(made)["goodput_ratio"] == pytest.approx(3 * 6 / 100)
    assert shown(made)["useful_seconds"] == pytest.approx(3 * 6)
    fresh = Gauges(RunSettings(snapshot="s"))
    fresh.show(row(1, 1010.0))
    assert shown(fresh)["goodput_ratio"] == pytest.approx(0.6)


def test_the_lag_of_states_counts_from_when_the_newest_was_whole() -> None:
    begun = time.time()
    made = Gauges(RunSettings(snapshot="s", checkpoint_every=5))
    made.show(row(1, begun + 10, checkpoint_step=0))
    assert begun <= shown(made)["checkpoint_unixtime"] < begun + 10
    made.show(row(6, begun + 60, checkpoint_step=5))
    made.show(row(7, begun + 70, checkpoint_step=5))
    told = shown(made)
    assert (told["step"], told["checkpoint_step"], told["checkpoint_every_steps"]) == (7, 5, 5)
    assert told["checkpoint_unixtime"] == begun + 60


def test_blocks_of_the_cache_are_counted_where_there_is_one() -> None:
    made = Gauges(RunSettings(snapshot="s"))
    made.show(row(1, 10.0))
    assert not [key for key in shown(made) if "cache" in key[0]]
    made.show(row(2, 20.0, cache_hits=3, cache_misses=2))
    made.show(row(3, 30.0, cache_hits=1, cache_misses=0))
    assert shown(made)["cache_blocks_total", "run", "yes"] == 4
    assert shown(made)["cache_blocks_total", "run", "no"] == 2


def test_gauges_are_set_again_until_they_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics

    calls: list[tuple[float, dict[str, str]]] = []

    class FakeGauge:
        def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
            pass

        def set(self, value: float, labels: dict[str, str]) -> None:
            calls.append((value, labels))

    monkeypatch.setattr(ray.util.metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(cluster, "TOLD_EVERY_S", 0.01)
    metrics = RayMetrics({"left": ("gauge", "What is left.", ("lake",))})
    metrics.set("left", 3, lake="a")
    until = time.monotonic() + 10
    while len(calls) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    metrics.close()
    time.sleep(0.1)
    told = len(calls)
    time.sleep(0.1)
    assert len(calls) == told >= 3
    assert calls[-1] == (3, {"lake": "a"})
