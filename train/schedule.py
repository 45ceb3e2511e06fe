"""This module is the learning rate: a function of the step and of nothing else."""

from __future__ import annotations

import math

from train.settings import RunSettings


def learning_rate(settings: RunSettings, step: int) -> float:
    """Return the rate of a step, which depends on nothing else: warm-up, then as ``optim.schedule`` says."""
    told = settings.optim
    if step < told.warmup_steps:
        return told.lr * (step + 1) / (told.warmup_steps + 1)
    if told.schedule == "wsd":
        left = (settings.steps - step) / max(1.0, told.decay_share * settings.steps)
        return told.lr * min(1.0, max(0.0, left))
    progress = (step - told.warmup_steps) / max(1, settings.steps - told.warmup_steps)
    return told.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))
