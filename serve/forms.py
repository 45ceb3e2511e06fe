"""This module is the table of forms that bodies have: which a request may have, which a reply is wanted in.

Shape letters used in this module:
    C  cells      D  size of an embedding
"""

from __future__ import annotations

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


def form_of(accept: str) -> str:
    """Return the form of arrays that an Accept header names first; empty where it names none, so that JSON is sent."""
    named = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return next((one for one in named if one in (JSON, NPZ, ARROW)), JSON).replace(JSON, "")


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
