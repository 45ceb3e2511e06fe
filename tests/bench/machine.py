"""What a benchmark's page says of the machine that it ran on."""

from __future__ import annotations

import os
import platform

import psutil


def machine() -> dict[str, object]:
    """Return the fields ``machine``, ``cores``, ``memory`` (GiB) and ``python`` of a page."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f}",
        "python": platform.python_version(),
    }
