"""This module is what is asked of a cell, beside what is seen of it and said of it: a task is a prompt, not a model.

Shape letters used in this module:
    C  cells      M  measurements
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.tokens import Tokens

TASKS = ("", "reconstruct", "annotate", "translate", "perturb", "forecast", "generate")
"""What a model can be asked for; a task's position is its code, "" (not said) is the first."""


@dataclass(frozen=True)
class Asked:
    """What is asked of each cell.

    Attributes:
        task_C: Codes of ``TASKS``.
        target_CM: Which measurements are asked for; none at all is "not said".
        log_depth_CM: log1p of the counts that the answer is to have in each; 0 is "not said".
        elapsed_C: How much later than what is seen the answer is, in the units of ``time``; NaN is "not said".
    """

    task_C: Tensor
    target_CM: Tensor
    log_depth_CM: Tensor
    elapsed_C: Tensor


def ask(
    tokens: Tokens, task: str = "", target: int | None = None, depth: float = 0.0, elapsed: float | None = None
) -> Asked:
    """Ask the same of every cell.

    Args:
        tokens: What is seen of the cells.
        task: One of ``TASKS``.
        target: The number of the measurement that is asked for; None does not say it.
        depth: Counts that the answer is to have; 0 does not say it.
        elapsed: How much later; None does not say it.
    """
    measured_CM = tokens.measured_CM
    target_CM = torch.zeros_like(measured_CM)
    if target is not None:
        target_CM[:, target] = True
    log_depth_CM = torch.log1p(torch.full(measured_CM.shape, depth, device=measured_CM.device)) * target_CM
    task_C = torch.full(measured_CM.shape[:1], TASKS.index(task), device=measured_CM.device)
    said = float("nan") if elapsed is None else elapsed
    return Asked(task_C, target_CM, log_depth_CM, torch.full(measured_CM.shape[:1], said, device=measured_CM.device))
