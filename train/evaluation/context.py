"""This module is how the values of several columns are one context, and how they are told apart again."""

from __future__ import annotations

import re
from collections.abc import Iterable

BETWEEN = " | "


def context_of(values: Iterable[str]) -> str:
    """Join the values of a context's columns by `` | ``; a bar within a value gets a backslash."""
    return BETWEEN.join(value.replace("\\", "\\\\").replace("|", "\\|") for value in values)


def values_of(context: str) -> list[str]:
    """Return the values that :func:`context_of` joined."""
    return [re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for value in context.split(BETWEEN)]
