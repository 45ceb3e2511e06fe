"""What a GPU must do as a CPU does. Imports torch and numpy alone, so that a bare machine with a GPU runs it:

    PYTHONPATH=.:tests python tests/on_gpu.py [--device cuda]

A line is printed for each check; the last one is a JSON object. It ends with status 1 if one failed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from made_cells import OF, cells

from train.attention import Segments, attend
from train.cells import PROMPTS
from train.config import ModelConfig
from train.model import CellModel
from train.objective import Objective
from train.tokens import TokenSettings, make_tokens

VALUES = ("log1p", "bins", "rank")
CHANCES = (None, (3, 17))
ATTENTION = ("full", "hybrid")


def tokens(device: torch.device, counts: str, values: Any, chance: tuple[int, int] | None) -> None:
    """Tokens are the same to the bit."""
    settings, (batch, offsets) = TokenSettings(budget=20, values=values, bins=7), OF[counts]
    here, there = (make_tokens(batch, offsets, settings, chance=chance, device=at) for at in (None, device))
    for name, value in vars(here).items():
        found = getattr(there, name)
        if isinstance(value, torch.Tensor):
            assert found.device.type == device.type, name
            assert torch.equal(torch.nan_to_num(found.cpu(), -1.0), torch.nan_to_num(value, -1.0)), name
        else:
            assert found == value, name


def attention(device: torch.device) -> None:
    """Attention over ragged sequences in half precision is that over padded ones in single, gradients too."""
    n_q, n_k = [30, 1, 0, 400], [200, 50, 3, 0]
    chance = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(n), 4, 64, generator=chance) for n in (n_q, n_k, n_k)]
    weight = torch.randn(sum(n_q), 4, 64, generator=chance)

    def answer(at: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [x.to(at, dtype).requires_grad_() for x in inputs]
        out = attend(*given, *(Segments.of(torch.tensor(n, device=at)) for n in (n_q, n_k)))
        (out.float() * weight.to(at)).sum().backward()
        return [one.detach().float().cpu() for one in (out, *(x.grad for x in given)) if one is not None]

    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    for found, expected in zip(answer(device, half), answer(torch.device("cpu"), torch.float32), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=3e-2)


def _objective(model: CellModel, device: torch.device) -> Objective:
    panels = {name: np.ones((1, size), bool) for name, size in model.config.n_features.items()}
    return Objective(panels, TokenSettings(budget=30), 0, device)


def _step(
    model: CellModel, device: torch.device, precision: torch.dtype | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return a step's loss and gradients."""
    own = copy.deepcopy(model).to(device)
    objective = _objective(own, device)
    with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
        loss, *_ = objective(own, own, cells(), 5)
    torch.autograd.backward(loss.total / loss.pairs)
    found = {name: one.grad.float().cpu() for name, one in own.named_parameters() if one.grad is not None}
    return float(loss.total.detach() / loss.pairs), found


def _model(attention: str) -> CellModel:
    torch.manual_seed(0)
    sizes = {"width": 64, "layers": 4, "heads": 2, "attention": attention, "n_terms": 0}
    return CellModel(ModelConfig({"RNA": 30, "protein": 8}, dict.fromkeys(PROMPTS, 10), 10, **sizes))  # type: ignore[arg-type]


def step(device: torch.device, attention: str) -> None:
    """A step in single precision has the loss and the gradients of the same step on CPU."""
    model = _model(attention)
    (loss, gradients), (expected, others) = (_step(model, at, None) for at in (device, torch.device("cpu")))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, others[name], rtol=2e-2, atol=1e-4, msg=lambda text, of=name: f"{of}: {text}"
        )


def half(device: torch.device, attention: str) -> None:
    """A step in half precision has nearly the loss of one in single, and gradients that point the same way."""
    model = _model(attention)
    (loss, gradients), (expected, others) = (
        _step(model, device, torch.bfloat16),
        _step(model, torch.device("cpu"), None),
    )
    np.testing.assert_allclose(loss, expected, rtol=0.02)
    mine, reference = (torch.cat([one[name].flatten() for name in sorted(others)]) for one in (gradients, others))
    assert torch.cosine_similarity(mine, reference, dim=0) > 0.98


def waits(device: torch.device) -> int:
    """Return how often a step waits for the device, as torch says; 0 where there is none."""
    if device.type != "cuda":
        return 0
    model = _model("hybrid").to(device)
    objective = _objective(model, device)
    for counted in (False, True):
        torch.cuda.set_sync_debug_mode("warn" if counted else "default")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with torch.autocast("cuda", torch.bfloat16):
                loss, *_ = objective(model, model, cells(), 5)
            torch.autograd.backward(loss.total / loss.pairs)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)


def main() -> int:
    """Run all checks."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda")
    device = torch.device(options.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("on_gpu: torch sees no GPU here; --device cpu tries the checks themselves")
    checks: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [("attention", attention, ())]
    checks += [(f"tokens: {', '.join(map(str, of))}", tokens, of) for of in itertools.product(OF, VALUES, CHANCES)]
    checks += [(f"{of.__name__}: {kind}", of, (kind,)) for of in (step, half) for kind in ATTENTION]
    failed = []
    for name, check, words in checks:
        begin = time.perf_counter()
        try:
            check(device, *words)
        except Exception:  # noqa: BLE001 - the others are to run
            failed.append(name)
            traceback.print_exc()
        print(f"{'FAILED' if name in failed else 'passed'} {name} ({time.perf_counter() - begin:.1f} s)", flush=True)
    what = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"device": what, "checks": len(checks), "failed": failed, "waits": waits(device)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
