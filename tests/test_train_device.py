"""On another device the same comes out, and no operation mixes it with the host's: what a GPU asks for, without one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apart
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from apart import DEVICE, Apart, device_apart, host
from made_cells import OF
from scipy.sparse import csr_matrix
from small_checkpoint import write_checkpoint
from studies import perturbed
from test_train_loop import lake, losses, settings  # noqa: F401  (lake is a fixture)
from torch import Tensor

from store.errors import UsageError
from train import checkpoint
from train.attention import _masked, _varlen
from train.evaluation.ours import cells_of
from train.evaluation.scratch import ScratchSettings, adapt_on, train_on
from train.loop import Run
from train.predictor import Predictor
from train.tokens import TokenSettings, make_tokens

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def other_precisions() -> Iterator[None]:
    """Let runs of this process have other precisions than those before: Accelerate keeps the first."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with device_apart() as device:
        there = torch.arange(6.0, device=device)
        assert (there + 1 - torch.tensor(1)).sum().item() == 15
        assert there.cpu().tolist() == there.tolist() == [0, 1, 2, 3, 4, 5]
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(6)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(6)[there.long()]
        with pytest.raises(TypeError, match="host's memory"):
            there.numpy()


@pytest.mark.parametrize("values", ["log1p", "bins", "rank"])
@pytest.mark.parametrize("chance", [None, (3, 17)])
@pytest.mark.parametrize("counts", OF)
def test_tokens_made_there_are_those_made_here_to_the_bit(
    values: Any, chance: tuple[int, int] | None, counts: str
) -> None:
    told, (batch, offsets) = TokenSettings(budget=20, values=values, bins=7), OF[counts]
    here = make_tokens(batch, offsets, told, chance=chance)
    with device_apart() as device:
        there = make_tokens(batch, offsets, told, chance=chance, device=device)
    for name, value in vars(here).items():
        if isinstance(value, torch.Tensor):
            found = getattr(there, name)
            assert isinstance(found, Apart), name
            assert torch.equal(torch.nan_to_num(host(found), -1.0), torch.nan_to_num(value, -1.0)), name


def test_what_a_gpu_is_asked_runs_with_torch_and_numpy_alone() -> None:
    absent = (
        "accelerate",
        "hypothesis",
        "numba",
        "pandas",
        "pyarrow",
        "pytest",
        "ray",
        "scipy",
        "tiledb",
        "tiledbsoma",
    )
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv[1:] = ['--device', 'cpu']; "
        f"sys.path[:0] = [{str(TESTS.parent)!r}, {str(TESTS)!r}]; runpy.run_path({str(TESTS / 'on_gpu.py')!r}, "
        "run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"device": "cpu", "checks": 17, "failed": [], "waits": 0}


@pytest.mark.parametrize("attention", ["full", "hybrid"])
def test_a_run_there_takes_the_steps_of_a_run_here(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
) -> None:
    data = {"global_batch": 24, "block": 64, "window": 2, "tokens": 32, "micro_batch": 8, "matched_controls": 0.3}
    told = {
        "steps": 5,
        "model": {"width": 16, "layers": 4, "heads": 2, "attention": attention},
        "data": data,
        "evaluate_every": 2,
        "recompute": attention == "hybrid",
    }
    Run(settings(lake, tmp_path / "here", **told), 1).train()
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
    with device_apart():
        run = Run(settings(lake, tmp_path / "there", **told), 1)
        summary = run.train()
        assert all(isinstance(weight.data, Apart) for weight in run.plain.parameters())
    np.testing.assert_allclose(losses(tmp_path / "there"), losses(tmp_path / "here"), rtol=1e-5)
    own = [Predictor.load(folder / "run/checkpoint") for folder in (tmp_path / "here", tmp_path / "there")]
    assert str(summary.checkpoint) == str(tmp_path / "there/run/checkpoint")
    for one, other in zip(*(predictor.model.parameters() for predictor in own), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_a_step_waits_for_the_device_a_few_times_whatever_the_number_of_layers(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def waited(layers: int, micro_batch: int) -> list[str]:
        model = {"width": 16, "layers": layers, "heads": 2, "attention": "hybrid"}
        data = {"global_batch": 24, "block": 64, "window": 2, "tokens": 32, "micro_batch": micro_batch}
        run = Run(settings(lake, tmp_path / f"{layers}-{micro_batch}", model=model, data=data), 1)
        batch = next(run.stream.steps(0, 1, rank=0, world=1))
        run._one(batch)  # the first makes what stays
        apart.waits.clear()
        run._one(batch)
        return list(apart.waits)

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any, **__: Any) -> Tensor:
        return q * 0.1 + v.mean() * 0.1  # waits for nothing

    monkeypatch.setattr(Accelerator, "device", DEVICE)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr("train.attention._masked", _varlen)
    with device_apart():
        few, many, parts = waited(4, 0), waited(12, 0), waited(4, 12)
    assert few == many
    assert len(few) <= 18, Counter(few)
    assert len(parts) - len(few) <= 16, "a part more waits for its own shapes, and for no sums"


def obvious_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, *, scale: float
) -> Tensor:
    """What torch's flash attention over variable lengths does, in single precision; it takes what that one takes."""
    for x, cu, longest in ((q, cu_q, longest_q), (k, cu_k, longest_k), (v, cu_k, longest_k)):
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert (x.dtype, x.device, cu.device) == (q.dtype, q.device, q.device)
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256
        assert cu.dtype == torch.int32
        assert (int(cu[0]), int(cu[-1])) == (0, len(x))
        assert int(cu.diff().max()) == longest
    assert (cu_k.diff() > 0).all(), "a segment without keys gives what nobody defines"
    out = []
    for a, b, c in zip(
        *(x.float().split(cu.diff().tolist()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))), strict=True
    ):
        weight = (torch.einsum("nhd,khd->hnk", a, b) * scale).softmax(-1)
        out.append(torch.einsum("hnk,khd->nhd", weight, c))
    return torch.cat(out).to(q.dtype)


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")  # torch, of its norms in half precision on CPU
@pytest.mark.parametrize("attention", ["full", "hybrid"])
def test_a_run_in_half_precision_gives_the_kernel_of_gpus_what_it_takes(
    lake: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
) -> None:
    told = {"precision": "bf16", "steps": 4, "model": {"width": 16, "layers": 4, "heads": 2, "attention": attention}}
    Run(settings(lake, tmp_path / "masked", **told), 1).train()
    asked = []

    def varlen_attn(*inputs: Any, **words: Any) -> Tensor:
        asked.append(len(inputs))
        return obvious_varlen(*inputs, **words)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(
        "train.attention._masked", lambda q, *rest: (_varlen if q.dtype == torch.bfloat16 else _masked)(q, *rest)
    )
    Run(settings(lake, tmp_path / "varlen", **told), 1).train()
    np.testing.assert_allclose(losses(tmp_path / "varlen"), losses(tmp_path / "masked"), rtol=0.01)
    assert len(asked) >= 4 * 5, "in each step, of each block"


def test_a_predictor_there_answers_as_one_here(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    rng = np.random.default_rng(0)
    counts = {
        "RNA": rng.poisson(0.7, (30, 40)).astype(np.float32),
        "protein": rng.poisson(3, (30, 5)).astype(np.float32),
    }

    def answers(predictor: Predictor) -> dict[str, Any]:
        asked = predictor.cells({name: csr_matrix(part) for name, part in counts.items()}, {"tissue": ["lung"] * 30})
        perturbed, later = predictor.perturb(asked, ["G1", "G2"]), predictor.forecast(asked, 3.0)
        return {
            "embed": predictor.embed(asked),
            "annotate": predictor.annotate(asked),
            "vectors": predictor.vectors("RNA", [0, 7, 39]),
            "shares": predictor.shares(asked, "protein"),
            "draw": predictor.draw(asked, "RNA", 1000.0).toarray().mean(0),
        } | {
            f"{name} of {what}": one[name].delta_G
            for what, one in (("hit", perturbed), ("later", later))
            for name in one
        }

    here = answers(Predictor.load(folder))
    with device_apart() as device:
        loaded = checkpoint.load(folder)
        loaded.model.to(device)
        there = answers(Predictor(loaded, str(device)))
    assert here.keys() == there.keys()
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_adapter_is_trained_where_its_model_is() -> None:
    study, quick = perturbed(["t0"], n_cells=20), ScratchSettings(steps=3, model={"width": 16, "layers": 1, "heads": 2})
    base = train_on(study, quick)
    here = adapt_on(base, study, quick)
    with device_apart() as device:
        base.model.to(device)
        there = adapt_on(
            Predictor(
                checkpoint.Checkpoint(base.model, base.tokens, base.vocabulary, base.prompts, base.manifest),
                str(device),
            ),
            study,
            quick,
        )
        assert all(isinstance(weight.data, Apart) for weight in there.model.parameters())
        found = there.embed(cells_of(there, study, ["RNA"], ["cell_type"]))
    np.testing.assert_allclose(found, here.embed(cells_of(here, study, ["RNA"], ["cell_type"])), rtol=1e-3, atol=1e-4)


def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(UsageError, match=r"device 'cuda': torch .* finds none on this machine; say cpu"):
        Predictor.load(folder, "cuda")
    with pytest.raises(UsageError, match="device 'gpu': torch knows no such device; say cpu, or cuda"):
        Predictor.load(folder, "gpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert checkpoint.device_of("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"device 'cuda:2': .* finds 2 cuda on"):
        checkpoint.device_of("cuda:2")
