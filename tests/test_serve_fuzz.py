"""Bodies that were made to harm, in every form: refused with a reason, and the server stays as it was."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pyarrow as pa
import pytest
from fake_predictor import FakePredictor
from hostile_files import CORRUPTIONS, corrupt
from starlette.testclient import TestClient
from test_serve_foreign import PLAIN, claiming, counted, file_of, stream, table

from serve.app import make_app
from serve.arrow import ARROW
from serve.forms import JSON
from serve.npz import NPZ, write_npz
from serve.replica import Replica
from serve.settings import Limits, ServeSettings

FUZZED = int(os.environ.get("SOMAFLOW_FUZZ", "400"))
"""Damaged bodies that are sent, over all forms."""
GROWTH_BYTES = 128 * 2**20
"""The server's own memory may grow by so much from the first hundred bodies on; its readers have a limit of theirs."""
LIMITS = Limits(
    cells=100, nonzeros=10_000, features=500, unpacked_bytes=2**20, body_bytes=2**18, reader_s=5, reader_bytes=2**29
)
FORM = "multipart/form-data; boundary=b"
MESSAGE = {"options": {"normalize": True, "feature_embeddings": {"RNA": ["G1"]}}, "prompts": {"tissue": ["", "lung"]}}
ODD: list[Any] = [None, True, -1, 0, 2**63, 2**70, 1e308, -0.0, "", "\0", "G0" * 200, "\ud800", [], {}, [[]], [{}] * 3]
ODD += [[0, 2**63 - 1, -5, 4]]  # as indptr it falls by more than 64 bits hold
ARRAYS = {
    "RNA/features": np.array([b"G0", b"G1", b"NOPE"]),
    "RNA/indptr": np.array([0, 2, 4]),
    "RNA/indices": np.array([0, 1, 0, 2], np.int32),
    "RNA/data": np.array([1, 4, 2, 1], np.float32),
}
MATRIX = {"RNA": {"features": ["G0", "G1", "NOPE"], "indptr": [0, 2, 4], "indices": [0, 1, 0, 2], "data": [1, 4, 2, 1]}}
ODD_ARRAYS: list[np.ndarray] = [
    np.array([]),
    np.array([[1.0]]),
    np.array([np.nan, np.inf, -1.0, 2.0]),
    np.array([2**63 - 1, -(2**63), 0, 1]),
    np.array([0, 2**63 - 1, -5, 4]),
    np.array([0, 9, 4], np.uint8),
    np.array([2**64 - 1, 0], np.uint64),
    np.array(["x", "\ud7ff" * 300]),
    np.array([1 + 2j]),
    np.array(["2020-01-01"], "M8[D]"),
    np.zeros(4, bool),
    np.arange(5, dtype=np.int8),
]
ODD_COLUMNS: list[Any] = [
    pa.array([None, None]),
    pa.array([[1], None]),
    pa.array([[[1]], [[2]]]),
    pa.array([[1, 2], [3]], pa.list_(pa.uint64())),
    pa.array([["G0"], ["\U0010ffff" * 90]]),
    pa.array([[b"\xff\xfe"], [b""]]),
    pa.array([{"a": 1}, {"a": 2}]),
    pa.array([[1.5, float("nan")], [float("-inf"), 1]]),
    pa.array([[("G0", 1)], [("G1", 2)]], pa.map_(pa.string(), pa.int32())),
    pa.array([["G0", None], ["G1", "G1"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
    pa.array([[2**62, 2], [1, 1]], pa.large_list(pa.int64())),
]
Body = tuple[str, bytes]
"""A content type and what is sent as it."""


def form(file: bytes, message: Any = None, **parts: bytes) -> bytes:
    said = {"file": file, "request": json.dumps(message or {}).encode()} | parts
    head = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="x"\r\n\r\n%s\r\n'
    return b"".join(head % (name.encode(), value) for name, value in said.items()) + b"--b--\r\n"


class Maker:
    """Makes damaged bodies, the same for the same seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = np.random.default_rng(seed), folder
        self.file = file_of(counted(gene_ids=["a", "b", "c"]), folder)
        self.hostile = [corrupt(folder, change).read_bytes() for change in CORRUPTIONS]
        arrays = {"request": json.dumps(MESSAGE).encode(), **ARRAYS}
        self.good: list[Body] = [
            (JSON, json.dumps({"counts": PLAIN, **MESSAGE}).encode()),
            (NPZ, write_npz(arrays)),
            (ARROW, stream(table(MESSAGE))),
            (ARROW, stream(table(MESSAGE), "zstd", rows=1)),
            (ARROW, stream(table(MESSAGE), "lz4")),
            (FORM, form(self.file, MESSAGE)),
        ]
        self.builders: list[Callable[[], Body]] = [self.json, self.npz, self.arrow, self.h5ad]

    def one_of(self, choices: list[Any]) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def body(self) -> Body:
        """Damage bytes of a good body, build a wrong one, or call it what it is not."""
        match self.random.integers(8):
            case 0 | 1 | 2:
                media, content = self.one_of(self.good)
                return media, self.bytes(content)
            case 3:
                return self.one_of([media for media, _ in self.good]), self.one_of(self.good)[1]
            case _:
                return self.one_of(self.builders)()

    def bytes(self, content: bytes) -> bytes:
        bad = bytearray(content)
        for _ in range(int(self.random.integers(1, 6))):
            at = int(self.random.integers(len(bad)))
            match self.random.integers(6):
                case 0:
                    bad[at] ^= 1 << int(self.random.integers(8))
                case 1:
                    bad[at : at + 4] = self.random.bytes(4)
                case 2:
                    bad[at : at + 8] = self.one_of([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f" * 2, b"\0\0\0\x80" * 2])
                case 3:
                    del bad[at : at + int(self.random.integers(1, 40))]
                case 4:
                    bad[at:at] = self.random.bytes(int(self.random.integers(1, 40)))
                case _:
                    bad[at:] = bad[at : at + 200]
            if not bad:
                break
        return bytes(bad)

    def message(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Put something odd somewhere into a message."""
        made = copy.deepcopy(whole)
        inside: Any = made
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            key = self.one_of(keys)
            if isinstance(inside[key], dict | list) and inside[key] and self.random.random() < 0.75:
                inside = inside[key]
                continue
            match self.random.integers(3):
                case 0:
                    inside[key] = self.one_of(ODD)
                case 1:
                    del inside[key]
                case _ if isinstance(inside, dict):
                    inside[str(self.one_of(ODD))] = inside[key]
                case _:
                    inside += [inside[key]] * 3
            return made

    def json(self) -> Body:
        counts = self.one_of([PLAIN, MATRIX])
        return JSON, json.dumps(self.message({"counts": counts, **self.one_of([MESSAGE, {}])})).encode()

    def npz(self) -> Body:
        message = self.one_of([self.message(MESSAGE), {}])
        arrays: dict[str, Any] = {"request": json.dumps(message).encode(), **ARRAYS}
        if self.random.random() < 0.7:
            arrays[self.one_of(list(arrays))] = self.one_of(ODD_ARRAYS)
        return NPZ, write_npz(arrays)

    def arrow(self) -> Body:
        made = table(self.message(MESSAGE) if self.random.random() < 0.3 else MESSAGE)
        if self.random.random() < 0.8:
            at = int(self.random.integers(made.num_columns))
            column = self.one_of(ODD_COLUMNS)
            made = made.set_column(at, self.one_of([made.column_names[at], "cell", "/counts"]), column)
        return ARROW, stream(made, self.one_of([None, "zstd", "lz4"]))

    def h5ad(self) -> Body:
        if self.random.random() < 0.3:
            return FORM, form(self.one_of(self.hostile))
        path = self.folder / "changed.h5ad"
        path.write_bytes(self.file)
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            name = self.one_of(names)
            match self.random.integers(4):
                case 0:
                    del file[name]
                case 1:
                    del file[name]
                    odd = self.one_of([array for array in ODD_ARRAYS if array.dtype.kind in "iufb"])
                    file[name] = odd
                case 2:
                    del file[name]
                    file[name] = np.array([b"\xff\xfe", b"G0"], "S9")
                case _:
                    attributes = file[name].attrs
                    if len(attributes):
                        attributes[self.one_of(list(attributes))] = self.one_of([b"\xff", -1, [2**62, 3], "csc_matrix"])
        message = self.message(MESSAGE) if self.random.random() < 0.2 else MESSAGE
        return FORM, form(path.read_bytes(), message, **({"layer": self.random.bytes(5)} if at_times(self) else {}))


def at_times(maker: Maker) -> bool:
    return bool(maker.random.random() < 0.1)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    with TestClient(make_app(replica, LIMITS), raise_server_exceptions=False) as client:
        yield client
    replica.close()


def post(client: TestClient, body: Body, path: str = "embed", accept: str = "*/*") -> Any:
    return client.post(f"/v1/{path}", content=body[1], headers={"Content-Type": body[0], "Accept": accept})


def test_damaged_bodies_of_every_form_never_break_the_server(client: TestClient, tmp_path: Path) -> None:
    maker, told = Maker(0, tmp_path), Counter[tuple[str, int]]()
    for body in maker.good:
        assert post(client, body).status_code == 200, body[0]
    process, begin, most = psutil.Process(), 0, 0
    for number in range(FUZZED):
        if number == min(100, FUZZED // 2):
            begin = process.memory_info().rss
        body = maker.body()
        reply = post(client, body, maker.one_of(["embed", "embed", "annotate"]), maker.one_of(["*/*", NPZ, ARROW]))
        assert 200 <= reply.status_code < 300 or 400 <= reply.status_code < 500, (number, body, reply.text)
        assert b"Traceback" not in reply.content
        told[body[0].partition(";")[0], reply.status_code] += 1
        if number % 500 == 0:
            most = max([most, *(psutil.Process(pid).memory_info().rss for pid in client.app.state.readers.pids)])
        if number + 1 in (FUZZED, *range(10_000, FUZZED, 10_000)):
            growth, replaced = process.memory_info().rss - begin, client.app.state.readers.crashes
            print(f"\n{number + 1:,} bodies: {dict(sorted(told.items()))}; {replaced:,} readers replaced")
            print(
                f"memory grew by {growth / 2**20:.1f} MiB to {(begin + growth) / 2**20:.0f}; a reader's: {most >> 20}"
            )
    assert growth < GROWTH_BYTES
    assert most < LIMITS.reader_bytes
    assert {media for media, status in told if status == 200} == {JSON, NPZ, ARROW, "multipart/form-data"}
    for body in maker.good:
        assert post(client, body).status_code == 200, body[0]


def bombs(folder: Path) -> dict[str, Body]:
    wide = pa.ListArray.from_arrays(pa.array([0, 8_000_000], pa.int32()), pa.array(np.zeros(8_000_000)))
    columns = {"RNA/counts": wide, "RNA/features": pa.array([["G0"]])}
    many = pa.ListArray.from_arrays(pa.array(np.zeros(3_000_001, np.int32)), pa.array([], pa.int8()))
    nothing = {"RNA/counts": many, "RNA/features": many.cast(pa.list_(pa.string()))}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("RNA/data.npy", bytes(50_000_000))
    path = folder / "bomb.h5ad"
    with h5py.File(path, "w") as file:
        zeros = np.zeros((100, 100_000))
        file.create_dataset("X", data=zeros, chunks=(100, 20_000), compression="gzip")
        file.create_group("var").attrs["_index"] = "_index"
        file["var/_index"] = np.array([b"g"] * 3)
    return {
        "values in Arrow": (ARROW, stream(pa.table(columns, metadata={"request": "{}"}), "zstd")),
        "claims of Arrow": (ARROW, claiming(stream(table({}), "zstd"), 2**40)),
        "smaller claims of Arrow": (ARROW, claiming(stream(table({}), "zstd"), 2**28)),
        "rows in Arrow": (ARROW, stream(pa.table(nothing, metadata={"request": "{}"}), "zstd")),
        "npz": (NPZ, packed.getvalue()),
        "dense h5ad": (FORM, form(path.read_bytes())),
        "parts of a form": (FORM, b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n\r\n' * 4_000),
        "headers of a form": (FORM, b"--b\r\n" + b"a: b\r\n" * 40_000),
        "boundaries": (FORM, b"\r\n--" * 60_000),
        "deep JSON": (JSON, b'{"counts":' * 20_000),
        "flat JSON": (JSON, b'{"counts": {"RNA": [' + b"{}," * 80_000 + b"{}]}}"),
        "too large": (JSON, b" " * (LIMITS.body_bytes + 1)),
    }


def test_bombs_are_refused_for_little_memory(client: TestClient, tmp_path: Path) -> None:
    made, process = bombs(tmp_path), psutil.Process()
    post(client, made["values in Arrow"])
    before = process.memory_info().rss
    for name, body in made.items():
        assert len(body[1]) <= LIMITS.body_bytes + 1, name
        reply = post(client, body)
        assert 400 <= reply.status_code < 500, (name, reply.text)
        assert len(reply.content) < 3_000
    assert process.memory_info().rss - before < 2**26


def test_what_has_another_or_no_content_type_is_refused(client: TestClient, tmp_path: Path) -> None:
    maker = Maker(1, tmp_path)
    for media in (
        "text/plain",
        "",
        "application/octet-stream",
        "multipart/mixed; boundary=b",
        f"{ARROW}x",
        "\xff/\xfe",
    ):
        for _, content in maker.good:
            headers = {"Content-Type": media.encode("latin-1")} if media else {}
            assert client.post("/v1/embed", content=content, headers=headers).status_code == 415
    for media in ("multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary="'):
        assert post(client, (media, maker.good[-1][1])).status_code == 422
