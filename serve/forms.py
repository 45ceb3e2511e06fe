"""This module is the table of forms that bodies have: which a request may have, which a reply is wanted in.

Shape letters used in this module:
    C  cells      D  size of an embedding
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from serve.arrow import ARROW, write_reply
from serve.h5ad import FORM
from serve.npz import NPZ, REPLY, unpacked, write_npz

JSON = "application/json"
FORMS = (JSON, NPZ, ARROW, FORM)
"""Content types of requests about cells."""
FORM_SCHEMA: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": {"type": "string", "format": "binary", "description": "An h5ad file of AnnData."},
            "request": {"type": "string", "description": "The message without its counts, as JSON."},
            "layer": {"type": "string", "description": "The matrix of raw counts: X, raw, or a layer's name."},
        },
    }
}
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
CELLS_BODY: dict[str, Any] = {"requestBody": {"content": {NPZ: BINARY, ARROW: BINARY, FORM: FORM_SCHEMA}}}
"""Forms beside JSON of a request about cells, as OpenAPI has them."""


def form_of(accept: str) -> str:
    """Return the form of arrays that an Accept header likes best; empty where it names none, so that JSON is sent.

    Of those that it likes as much, the first counts; one of quality 0 is not sent.
    """
    named = [(part.partition(";")[0].strip().lower(), _quality(part)) for part in accept.split(",")]
    wanted = sorted((one for one in named if one[0] in (JSON, NPZ, ARROW) and one[1] > 0), key=lambda one: -one[1])
    return wanted[0][0].replace(JSON, "") if wanted else ""


def _quality(part: str) -> float:
    """Return the q of a part of an Accept header; 1 where it says none, or nonsense."""
    said = re.search(r";\s*q\s*=\s*([01](?:\.\d{0,3})?)\s*(?:;|$)", part.lower())
    return float(said[1]) if said else 1.0


def write(reply: BaseModel, form: str, field: str) -> bytes:
    """Write a reply with its array in bytes, and everything else as JSON beside it.

    Features' own vectors are further arrays of an npz; in Arrow, where each row is a cell, they stay in the JSON.
    """
    values_CD = unpacked(getattr(reply, field).model_dump())
    if form == ARROW:
        return write_reply(field, values_CD, reply.model_dump_json(exclude_none=True, exclude={field}).encode())
    features = getattr(reply, "feature_embeddings", None) or {}
    arrays = {f"feature_embeddings/{name}": unpacked(part.embeddings.model_dump()) for name, part in features.items()}
    left_out: Any = {field: True, "feature_embeddings": {name: {"embeddings"} for name in features}}
    rest = reply.model_dump_json(exclude_none=True, exclude=left_out).encode()
    return write_npz({field: values_CD, **arrays, REPLY: rest})
