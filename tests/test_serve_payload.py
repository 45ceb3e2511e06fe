"""Requests and replies as npz: the same answers as JSON; what lies about itself is refused before it is believed."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_predictor import FakePredictor
from starlette.testclient import TestClient
from test_serve_app import check_problem

from serve.app import make_app
from serve.errors import FieldRefused
from serve.explore import Offer
from serve.messages import EmbedRequest
from serve.npz import NPZ, write_npz
from serve.payload import read_request
from serve.replica import Replica
from serve.settings import Explore, Limits, ServeSettings

COUNTS = {
    "RNA/features": np.array([b"G0", b"G1", b"NOPE"]),
    "RNA/indptr": np.array([0, 2, 4]),
    "RNA/indices": np.array([0, 1, 0, 2], np.int32),
    "RNA/data": np.array([1, 4, 2, 1], np.float32),
}
PLAIN = {"RNA": {"features": ["G0", "G1", "NOPE"], "indptr": [0, 2, 4], "indices": [0, 1, 0, 2], "data": [1, 4, 2, 1]}}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    limits = Limits(cells=100, unpacked_bytes=100_000)
    with TestClient(make_app(replica, limits), raise_server_exceptions=False) as client:
        yield client
    replica.close()


def body(message: dict[str, Any] | bytes = b"{}", **changes: Any) -> bytes:
    said = message if isinstance(message, bytes) else json.dumps(message).encode()
    arrays = {"request": said, **COUNTS} | {name.replace("__", "/"): value for name, value in changes.items()}
    return write_npz({name: value for name, value in arrays.items() if value is not None})


def sent(client: TestClient, content: bytes, path: str = "embed", accept: str = "*/*") -> Any:
    return client.post(f"/v1/{path}", content=content, headers={"Content-Type": NPZ, "Accept": accept})


def test_every_question_takes_npz_and_answers_as_to_json(client: TestClient) -> None:
    for path, asked in {
        "embed": {"prompts": {"tissue": ["", "lung"]}, "options": {"normalize": True}},
        "annotate": {"options": {"top": 1}},
        "translate": {"measurement": "protein"},
        "forecast": {"elapsed": 1.5},
        "perturb": {"perturbations": ["G1"]},
    }.items():
        plain = client.post(f"/v1/{path}", json={"counts": PLAIN, **asked})
        assert plain.status_code == 200, plain.text
        assert sent(client, body(asked), path).json() == plain.json()


@pytest.mark.parametrize(("path", "field"), [("embed", "embeddings"), ("translate", "values")])
def test_arrays_come_back_as_arrays_where_they_are_accepted(client: TestClient, path: str, field: str) -> None:
    asked = {"measurement": "protein"} if path == "translate" else {}
    reply = sent(client, body(asked), path, accept=NPZ)
    assert reply.headers["content-type"] == NPZ
    plain = client.post(f"/v1/{path}", json={"counts": PLAIN, **asked}).json()
    with np.load(io.BytesIO(reply.content), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays[field], np.array(plain.pop(field), np.float32))
        assert json.loads(arrays["reply"].tobytes()) == plain


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"message": b"[]"}, "request"),
        ({"message": b"{"}, "request"),
        ({"message": b"[" * 50_000}, "request"),
        ({"message": {"counts": {}}}, "request"),
        ({"message": {"options": {"dtype": "int8"}}}, "options.dtype"),
        ({"message": {"more": 1}}, "more"),
        ({"RNA__data": None}, "counts.RNA.data"),
        ({"RNA__data": np.array(["x"])}, "counts.RNA.data"),
        ({"RNA__data": np.array([1.0, np.nan, 1, 1])}, "counts.RNA.data.1"),
        ({"RNA__data": np.array([1.0])}, "counts.RNA.data"),
        ({"RNA__indptr": np.array([0, 9, 4])}, "counts.RNA.indptr.2"),
        ({"RNA__indptr": np.array([0, 2**63 - 1, -5, 4])}, "counts.RNA.indptr.2"),
        ({"RNA__indptr": np.array([0, 9, 4], np.uint8)}, "counts.RNA.indptr.2"),
        ({"RNA__indptr": np.array([[0, 2, 4]])}, "RNA/indptr"),
        ({"RNA__indices": np.array([0, 1, 0, 3])}, "counts.RNA.indices.3"),
        ({"RNA__indices": np.array([0, 1, 0, 2], np.uint64)}, "counts.RNA"),
        ({"RNA__features": np.array([], "S3")}, "counts.RNA.features"),
        ({"RNA__features": np.array([b"\xff", b"a", b"b"])}, "counts.RNA.features"),
        ({"RNA__features": np.array(["G0", "\ud800", "b"])}, "counts.RNA.features"),
        ({"RNA__others": np.array([], "S1")}, "counts.RNA.others"),
        ({"RNA__others": np.array([b"a", b"b"])}, "counts.RNA.others"),
        ({"RNA__more": np.array([1])}, "RNA/more"),
        ({"ATAC__data": np.array([1.0])}, "counts.ATAC.features"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, changes: dict[str, Any], field: str) -> None:
    report = check_problem(sent(client, body(**changes)), 422)
    assert report["errors"][0]["field"] in (field, "counts.ATAC.indptr")


def test_sizes_are_compared_before_they_are_believed(client: TestClient) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as archive:
        archive.writestr("request.npy", header.getvalue() + b"12345678")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("RNA/data.npy", bytes(50_000_000))
    pickled = io.BytesIO()
    np.savez(pickled, request=np.array([{}], dtype=object))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("request.npy", b"x")
    tracemalloc.start()
    for content in (huge.getvalue(), bomb.getvalue(), pickled.getvalue(), packed.getvalue(), b"", b"PK\x03\x04"):
        check_problem(sent(client, content), 422)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_counts_that_are_too_many_are_refused_before_they_are_unpacked() -> None:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    n = 30_000_000
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, dtype, values in (("data", "|u1", n), ("indices", "|u1", n), ("indptr", "<i8", 2)):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": (values,)})
            with archive.open(f"RNA/{name}.npy", "w", force_zip64=True) as member:
                member.write(header.getvalue() + bytes(values * np.dtype(dtype).itemsize))
    limits = Limits(nonzeros=1_000)
    with TestClient(make_app(replica, limits, offer=Offer(explore=Explore(nonzeros=1_000)))) as client:
        for path in ("embed", "explore"):
            tracemalloc.start()
            report = check_problem(sent(client, packed.getvalue(), path), 422)
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
            tracemalloc.stop()
            assert report["errors"][0]["field"] == "RNA/data"
    replica.close()


def test_an_array_is_unpacked_whole_and_its_checksum_compared(client: TestClient) -> None:
    content = bytearray(body())
    place = content.index(COUNTS["RNA/data"].tobytes())
    content[place + 3] ^= 1
    assert "CRC" in check_problem(sent(client, bytes(content)), 422)["detail"]


def test_a_bad_message_is_refused_in_the_words_of_its_form(client: TestClient) -> None:
    assert "as bytes (uint8)" in check_problem(sent(client, body(b"{")), 422)["detail"]
    with pytest.raises(FieldRefused) as refused:
        read_request(body(b"{"), EmbedRequest, Limits())
    assert refused.value.message == "must hold the message without its counts, a JSON object"
