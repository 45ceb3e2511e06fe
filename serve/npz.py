"""This module writes bodies as npz, which both sides of the HTTP interface may send in place of JSON.

An npz is a zip of ``.npy`` members. A request holds ``request``, the message without its counts as JSON in bytes, and
each measurement's counts as ``RNA/indptr``, ``RNA/indices``, ``RNA/data`` and ``RNA/features``. A reply holds
``reply``, the same as JSON but for its large array, and the array.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

NPZ = "application/x-npz"
REQUEST, REPLY = "request", "reply"
OTHERS = "others"
"""Further names of the features of a file, column after column; the model takes those that it knows most of."""
MEASUREMENTS = 16
"""Most measurements of a request."""
LONGEST_NAME = 256


def write_npz(arrays: Mapping[str, NDArray[Any] | bytes]) -> bytes:
    """Write arrays, and bytes as arrays of them; not compressed, since counts are sent over short ways."""
    file = io.BytesIO()
    plain: dict[str, Any] = {
        name: np.frombuffer(values, np.uint8) if isinstance(values, bytes) else values
        for name, values in arrays.items()
    }
    np.savez(file, **plain)
    return file.getvalue()


def unpacked(tensor: Mapping[str, Any]) -> NDArray[Any]:
    """Read an array that JSON has as ``dtype``, ``shape`` and ``base64`` of its little-endian bytes."""
    dtype = np.dtype(tensor["dtype"]).newbyteorder("<")
    flat = np.frombuffer(base64.b64decode(tensor["base64"]), dtype=dtype)
    return flat.reshape(tensor["shape"]).astype(tensor["dtype"])
