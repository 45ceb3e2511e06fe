"""What makes a step faster changes nothing but rounding: compiled blocks, 8 bits; and its arithmetic is counted."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import together
from test_train_loop import lake, losses, settings  # noqa: F401  (lake is a fixture)
from torch._dynamo.utils import counters

from store.errors import SettingsError, UsageError
from store.settings import parse_settings
from train import float8
from train.arithmetic import operations, peak_of, seen_in
from train.attention import Segments
from train.blocks import Block
from train.layout import lay_out
from train.loop import Run
from train.predictor import Predictor
from train.record import read_metrics
from train.settings import RunSettings

# torch, of its norms in half precision on CPU
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")


@pytest.fixture(autouse=True)
def other_precisions() -> Iterator[None]:
    """Let runs of this process have other precisions than those before: Accelerate keeps the first."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler, of itself
@pytest.mark.timeout(600)
def test_blocks_are_compiled_once_for_batches_of_all_sizes() -> None:
    torch.manual_seed(0)
    plain, compiled = Block(32, 4), Block(32, 4)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_dense()
    before = counters["stats"]["unique_graphs"]
    for longest in range(9, 25):
        lengths = torch.arange(3, longest)
        x, segments = torch.randn(int(lengths.sum()), 32), Segments.of(lengths)
        for one, other in ((plain(x, segments), compiled(x, segments)),):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        torch.autograd.backward(compiled(x, segments).sum())
    assert compiled.gate_proj.weight.grad is not None
    assert counters["stats"]["unique_graphs"] - before == 2, "before attention and after it"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler, of itself
@pytest.mark.timeout(600)
def test_a_compiled_run_takes_the_same_steps_and_may_go_on_uncompiled(lake: str, tmp_path: Path) -> None:  # noqa: F811
    Run(settings(lake, tmp_path / "plain"), 1).train()
    Run(settings(lake, tmp_path / "compiled", compile=True), 1).train()
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-4)
    assert Run(settings(lake, tmp_path / "compiled"), 1).resumed_from == 12


def test_no_compiler_is_said_before_the_first_step(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.get_cpp_compiler()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(UsageError, match=r"compile = true needs a C\+\+ compiler"):
        Run(settings(lake, tmp_path, compile=True), 1)
    cpp_builder.cpp_compiler_search.cache_clear()


def test_eight_bits_take_nearly_the_same_steps_alone_and_in_shards(lake: str, tmp_path: Path) -> None:  # noqa: F811
    def job(name: str, **changes: object) -> RunSettings:
        return settings(lake, tmp_path / name, steps=30, **changes)

    Run(job("half", precision="bf16"), 1).train()
    AcceleratorState._reset_state(True)
    run = Run(job("eight", precision="fp8"), 1)
    linear = [part for part in run.plain.blocks.modules() if isinstance(part, torch.nn.Linear)]
    assert {type(part).__name__ for part in linear} == {"Linear8"}
    summary = run.train()
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "half"), rtol=0.02)
    assert losses(tmp_path / "eight") != losses(tmp_path / "half")
    assert Predictor.load(summary.checkpoint).manifest["global_step"] == 30
    together(2, [job("shards", precision="fp8", parallel="fsdp")])
    np.testing.assert_allclose(losses(tmp_path / "shards"), losses(tmp_path / "eight"), rtol=0.02)


def test_eight_bits_that_cannot_be_are_refused(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="multiples of 16"):
        Run(settings(lake, tmp_path, precision="fp8", model={"width": 8, "layers": 1, "heads": 2}), 1)
    with pytest.raises(SettingsError, match="does not go with precision='fp8'"):
        parse_settings(RunSettings, {"snapshot": "s", "precision": "fp8", "adapter": {"base": "b"}}, where="t")
    monkeypatch.setitem(sys.modules, "train.float8", None)
    with pytest.raises(UsageError, match="needs torchao"):
        Run(settings(lake, tmp_path, precision="fp8"), 1)
    assert float8.emulated(torch.device("cpu"))


@pytest.mark.parametrize("attention", ["full", "hybrid"])
def test_what_a_step_reads_is_counted_as_it_is_laid_out(lake: str, tmp_path: Path, attention: str) -> None:  # noqa: F811
    run = Run(settings(lake, tmp_path, model={"width": 16, "layers": 4, "heads": 2, "attention": attention}), 1)
    config = run.plain.config
    batch = run.objective.prepare(run.plain, next(run.stream.steps(0, 1)), 0)
    layout = lay_out(batch.tokens, 1 + config.prompt_tokens + config.pathways, config.bottlenecks)
    seen = seen_in(config, batch.tokens, batch.queries)
    assert seen == batch.seen
    square = {name: int(getattr(layout, name).lengths.square().sum()) for name in ("cells", "pieces", "hubs")}
    assert (seen.joint, seen.within, seen.between) == (square["cells"], square["pieces"], square["hubs"])
    assert (seen.cells, seen.places, seen.hubs) == (24, layout.n_tokens, len(layout.hub_H))
    assert seen.queries == len(batch.queries.feature_Q)
    assert seen.read == int((layout.cells.lengths * batch.queries.cells.lengths).sum())


def test_the_share_of_a_gpus_arithmetic_is_written_where_its_peak_is_known(lake: str, tmp_path: Path) -> None:  # noqa: F811
    data = {"global_batch": 24, "block": 64, "tokens": 32, "micro_batch": 6}
    run = Run(settings(lake, tmp_path, report=True, data=data), 1)
    run.peak = 1e12
    run.train()
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    batch = next(run.stream.steps(0, 1))
    assert rows[0]["operations"] == pytest.approx(
        operations(run.plain, run.objective.prepare(run.plain, batch, 0).seen)
    )
    for row in rows:
        seconds = sum(row[key] for key in row if key.endswith("_s"))
        assert row["mfu"] == pytest.approx(row["operations"] / seconds / 1e12)
    assert "MFU" in (tmp_path / "run/report.html").read_text()


def test_peaks_are_those_of_the_device_that_torch_names() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", half=True) == 989e12
    assert peak_of("NVIDIA A100-SXM4-40GB", half=False) == 19.5e12
    assert peak_of("cpu", half=True) is None
