"""Arrow streams and h5ad files as bodies: the same answers as JSON; what breaks a reader breaks nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from fake_predictor import FakePredictor
from hostile_files import CORRUPTIONS, corrupt
from small_checkpoint import write_checkpoint
from starlette.testclient import TestClient
from test_serve_app import check_problem

from serve import h5ad
from serve.app import make_app
from serve.arrow import ARROW, read_reply
from serve.client import Client
from serve.foreign import Read, Readers
from serve.npz import NPZ, unpacked
from serve.replica import Replica
from serve.settings import Explore, Limits, ServeSettings
from serve.sources import read_h5ad_cells
from train.predictor import Predictor

PLAIN = {"RNA": [{"G0": 1, "G1": 4}, {"G0": 2, "NOPE": 1}], "protein": [{"CD4": 2}, {}]}
READ_FROM_VALUES = (
    "not_finite",
    "fractions",
    "beyond_float32",
    "twice_the_cell",
    "obs_too_short",
    "bad_text",
    "too_large",
)
"""What is wrong with obs or with values alone; obs is not looked at here, values are judged elsewhere."""


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    limits = Limits(cells=100, nonzeros=10_000, unpacked_bytes=2**20, values=60, reader_s=3, reader_bytes=2**29)
    with TestClient(make_app(replica, limits), raise_server_exceptions=False) as client:
        yield client
    replica.close()


def table(message: Any = None, **columns: Any) -> pa.Table:
    """The cells of ``PLAIN``, some columns of them others."""
    named = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    own = {
        "RNA/features": pa.array([["G0", "G1"], ["G0", "NOPE"]], named),
        "RNA/counts": pa.array([[1, 4], [2, 1]], pa.list_(pa.float32())),
        "protein/features": pa.array([["CD4"], []], pa.list_(pa.string())),
        "protein/counts": pa.array([[2], []], pa.large_list(pa.int16())),
    }
    own |= {name.replace("__", "/"): column for name, column in columns.items()}
    made = pa.table({name: column for name, column in own.items() if column is not None})
    said = message if isinstance(message, bytes | None) else json.dumps(message)
    return made.replace_schema_metadata(None if said is None else {"request": said})


def stream(made: pa.Table, compression: str | None = None, rows: int | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, made.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(made, rows)
    return sink.getvalue()


def claiming(content: bytes, size: int) -> bytes:
    """A stream whose first compressed buffer says that it unpacks to so many bytes."""
    frame = content.index(b"\x28\xb5\x2f\xfd")  # what zstd begins with; its size once unpacked stands before
    return content[: frame - 8] + size.to_bytes(8, "little") + content[frame:]


def sent(client: TestClient, content: bytes, path: str = "embed", accept: str = "*/*") -> Any:
    return client.post(f"/v1/{path}", content=content, headers={"Content-Type": ARROW, "Accept": accept})


def file_of(adata: anndata.AnnData, folder: Path) -> bytes:
    adata.write_h5ad(folder / "cells.h5ad")
    return (folder / "cells.h5ad").read_bytes()


def counted(**var: list[str]) -> anndata.AnnData:
    counts = scipy.sparse.csr_matrix(np.array([[1, 4, 0], [2, 0, 1]], np.float32))
    return anndata.AnnData(counts, var=pd.DataFrame(var, index=["G0", "G1", "NOPE"]))


def posted(client: TestClient, content: bytes, path: str = "embed", message: Any = None, **parts: str) -> Any:
    said = {"request": json.dumps(message or {})} | parts
    return client.post(f"/v1/{path}", files={"file": ("x.h5ad", content)}, data=said)


QUESTIONS: dict[str, dict[str, Any]] = {
    "embed": {"prompts": {"tissue": ["", "lung"]}, "options": {"normalize": True}},
    "annotate": {"options": {"top": 1}},
    "translate": {"measurement": "protein"},
    "forecast": {"elapsed": 1.5},
    "perturb": {"perturbations": ["G1"]},
}


def test_every_question_takes_arrow_and_answers_as_to_json(client: TestClient) -> None:
    for path, asked in QUESTIONS.items():
        plain = client.post(f"/v1/{path}", json={"counts": PLAIN, **asked})
        assert plain.status_code == 200, plain.text
        for content in (stream(table(asked)), stream(table(asked), "zstd", rows=1)):
            assert sent(client, content, path).json() == plain.json()


def test_every_question_takes_h5ad_and_answers_as_to_json(client: TestClient, tmp_path: Path) -> None:
    content = file_of(counted(), tmp_path)
    for path, asked in QUESTIONS.items():
        plain = client.post(f"/v1/{path}", json={"counts": {"RNA": PLAIN["RNA"]}, **asked})
        reply = posted(client, content, path, asked)
        assert reply.json() == plain.json()
        assert reply.headers["somaflow-counts-from"] == "X"


@pytest.mark.parametrize(("path", "field"), [("embed", "embeddings"), ("translate", "values")])
def test_arrays_come_back_as_a_column_where_arrow_is_accepted(client: TestClient, path: str, field: str) -> None:
    asked: dict[str, Any] = {"measurement": "protein"} if path == "translate" else {"options": {"dtype": "float16"}}
    reply = sent(client, stream(table(asked)), path, accept=f"{ARROW}, application/json")
    assert reply.headers["content-type"] == ARROW
    schema = pa.ipc.open_stream(reply.content).schema
    assert pa.types.is_fixed_size_list(schema.field(field).type)
    assert schema.field(field).type.value_type == (pa.float32() if path == "translate" else pa.float16())
    plain = client.post(f"/v1/{path}", json={"counts": PLAIN, **asked}).json()
    found = read_reply(reply.content)
    np.testing.assert_array_equal(found.pop(field), np.array(plain.pop(field), np.float32))
    assert found == plain


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (table(), "request"),
        (table([]), "request"),
        (table(b"{"), "request"),
        (table({"counts": {}}), "request"),
        (table({"options": {"dtype": "int8"}}), "options.dtype"),
        (table({}, RNA__counts=None), "counts.RNA.counts"),
        (table({}, cell_id=pa.array(["a", "b"])), "cell_id"),
        (table({}, RNA__counts=pa.array([["1"], ["2"]])), "counts.RNA.counts"),
        (table({}, RNA__counts=pa.array([[1.0, 4.0], [2.0]])), "counts.RNA.counts.1"),
        (table({}, RNA__counts=pa.array([[1.0, None], [2.0, 1.0]])), "counts.RNA"),
        (table({}, RNA__counts=pa.array([[1.0, 2.0], None])), "counts.RNA"),
        (table({}, RNA__counts=pa.array([[1.0, np.nan], [2.0, 1.0]])), "counts.RNA.data.1"),
        (table({}, RNA__features=pa.array([["G0", "G" * 300], ["G0", "G1"]])), "counts.RNA.features"),
        (table({}).slice(0, 0), "counts.RNA.features"),
        (pa.concat_tables([table({})] * 60), "body"),
        (pa.table({}).replace_schema_metadata({"request": "{}"}), "counts"),
    ],
)
def test_what_is_wrong_with_a_stream_is_named(client: TestClient, made: pa.Table, field: str) -> None:
    assert check_problem(sent(client, stream(made)), 422)["errors"][0]["field"] == field


def test_a_reader_that_dies_is_replaced_and_only_its_request_is_refused(client: TestClient) -> None:
    readers = _readers(client)
    good = stream(table({}))
    assert sent(client, good).status_code == 200
    os.kill(readers.pids[-1], signal.SIGKILL)
    os.waitid(os.P_PID, readers.pids[-1], os.WEXITED | os.WNOWAIT)
    reply = sent(client, good)  # it was gone before it was asked: nobody is refused
    assert reply.status_code == 200, reply.text
    bomb = claiming(stream(table({}), "zstd"), 2**40)
    report = check_problem(sent(client, bomb), 422)
    assert report["errors"][0]["field"] == "body"
    assert sent(client, good).status_code == 200


def test_a_reader_that_another_request_takes_first_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overtaken(deque[Any]):
        """Holds one whenever it is asked how many, and none when one is taken."""

        def __len__(self) -> int:
            return 1

    class Ready:
        alive, uses = True, 0

        def __init__(self, limits: Limits) -> None: ...

        def read(self, kind: str, body: bytes, limits: Limits) -> Read:
            return Read(body)

    monkeypatch.setattr("serve.foreign.Child", Ready)
    readers = Readers(Limits())
    readers._free = Overtaken()
    assert readers._read(ARROW, b"x", Limits()) == Read(b"x")


def test_a_reader_that_takes_too_long_is_stopped(client: TestClient) -> None:
    readers = _readers(client)
    sent(client, stream(table({})))
    crashes = readers.crashes
    os.kill(readers.pids[-1], signal.SIGSTOP)
    report = check_problem(sent(client, stream(table({}))), 422)
    assert "longer than 3 s" in report["detail"]
    assert readers.crashes == crashes + 1
    assert sent(client, stream(table({}))).status_code == 200


def test_a_reader_that_crashes_on_a_body_refuses_that_body(client: TestClient) -> None:
    readers = _readers(client)
    sent(client, stream(table({})))
    pid = readers.pids[-1]
    os.kill(pid, signal.SIGSTOP)  # so that it has the body, and not read it

    def crash() -> None:
        os.kill(pid, signal.SIGSEGV)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    going_on = threading.Timer(0.3, crash)
    going_on.start()
    report = check_problem(sent(client, stream(table({}))), 422)
    going_on.join()
    assert (report["errors"][0]["field"], pid in readers.pids) == ("body", False)
    assert "crashed" in report["detail"]
    assert sent(client, stream(table({}))).status_code == 200


def _readers(client: TestClient) -> Any:
    return client.app.state.readers  # type: ignore[attr-defined]


def test_where_counts_come_from_is_found_and_said(client: TestClient, tmp_path: Path) -> None:
    adata = counted()
    expected = posted(client, file_of(adata, tmp_path)).json()["embeddings"]
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.3
    reply = posted(client, file_of(adata, tmp_path))
    assert (reply.json()["embeddings"], reply.headers["somaflow-counts-from"]) == (expected, "layers/counts")
    reply = posted(client, file_of(adata, tmp_path), layer="X")
    assert "no whole numbers" in reply.json()["warnings"][0]
    adata.raw = anndata.AnnData(adata.layers["counts"], var=adata.var)
    for layer in ("counts", "layers/counts", "raw", "raw/X"):
        reply = posted(client, file_of(adata, tmp_path), layer=layer)
        said = "raw/X" if layer.startswith("raw") else "layers/counts"
        assert (reply.json()["embeddings"], reply.headers["somaflow-counts-from"]) == (expected, said)
    adata.uns["schema_version"] = "5.0.0"
    reply = posted(client, file_of(adata, tmp_path))
    assert (reply.json()["embeddings"], reply.headers["somaflow-counts-from"]) == (expected, "raw/X")
    del adata.layers["counts"], adata.raw
    assert "'layer'" in check_problem(posted(client, file_of(adata, tmp_path)), 422)["detail"]
    assert "layers/none" in check_problem(posted(client, file_of(adata, tmp_path), layer="none"), 422)["detail"]


@pytest.mark.parametrize("dtype", ["float16", ">f4", ">i4"])
@pytest.mark.parametrize("sparse", [False, True])
def test_files_of_halves_and_of_the_other_order_of_bytes_are_read(
    client: TestClient, tmp_path: Path, dtype: str, sparse: bool
) -> None:
    expected = posted(client, file_of(counted(), tmp_path)).json()["embeddings"]
    adata = counted()
    adata.X = adata.X.tocsc() if sparse else adata.X.toarray()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        where = "X/data" if sparse else "X"
        said, values = dict(file[where].attrs), file[where][()].astype(dtype)
        del file[where]
        file[where] = values
        file[where].attrs.update(said)
    content = (tmp_path / "cells.h5ad").read_bytes()
    assert posted(client, content).json()["embeddings"] == expected
    assert read_h5ad_cells(content, Explore(), Limits()).counts["RNA"].data.sum() == counted().X.sum()


def test_columns_dense_matrices_ids_and_types_of_features_are_understood(client: TestClient, tmp_path: Path) -> None:
    ids = [f"ENSG{number:011d}" for number in range(2)]
    adata = counted(gene_ids=[*ids, "x"], feature_types=["Gene Expression", "Gene Expression", "Antibody Capture"])
    adata.var_names = ["a", "b", "CD4"]
    for form in (scipy.sparse.csc_matrix, np.asarray):
        adata.X = form(counted().X.toarray())
        reply = posted(client, file_of(adata, tmp_path)).json()
        assert reply["coverage"]["RNA"]["mapped"] == 2
        assert [cell[:2] for cell in reply["embeddings"]] == [[5, 0], [2, 1]]


def test_features_of_a_file_go_by_the_column_that_the_model_knows_best(client: TestClient, tmp_path: Path) -> None:
    for n_known, ids in ((2, ["ENSG00000000100", "ENSG00000000101"]), (2, ["ENSG00000000000", "x"])):
        adata = counted(gene_ids=[*ids, "y"])
        assert posted(client, file_of(adata, tmp_path)).json()["coverage"]["RNA"]["mapped"] == n_known
    adata.var_names = ["TWIN", "b", "c"]
    assert posted(client, file_of(adata, tmp_path)).json()["coverage"]["RNA"]["mapped"] == 1


@pytest.mark.parametrize(
    ("table", "stored"),
    [([[0, 0.5], [-1, 0]], [0, 0.5, -1, 0]), ([[0, 1], [2, 0]], [1, 2]), ([[0, np.nan]], [0, np.nan])],
)
def test_zeros_of_a_named_table_of_levels_are_values(table: list[Any], stored: list[float], tmp_path: Path) -> None:
    adata = anndata.AnnData(np.array(table, np.float32), var=pd.DataFrame(index=["G0", "G1"]))
    form = httpx.Request("POST", "http://x", files={"file": file_of(adata, tmp_path)}, data={"layer": "X"})
    _, arrays, _ = h5ad.read(form.headers["content-type"], form.read(), Limits())
    np.testing.assert_array_equal(arrays["RNA/data"], stored)


def test_mudata_in_a_form_is_refused_by_its_name(client: TestClient, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "cells.h5mu", "w") as file:
        file.create_group("mod/rna")
    content = (tmp_path / "cells.h5mu").read_bytes()
    assert "is MuData" in check_problem(posted(client, content), 422)["detail"]


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([], "file"),
        ([("request", b"{}")], "file"),
        ([("file", b"x")], "file"),
        ([("file", b"x"), ("file", b"x")], "body"),
        ([("file", b"x"), ("more", b"x")], "body"),
    ],
)
def test_what_is_wrong_with_a_form_is_named(client: TestClient, parts: list[tuple[str, bytes]], field: str) -> None:
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)
        for name, value in parts
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    report = check_problem(client.post("/v1/embed", content=body + b"--b--\r\n", headers=headers), 422)
    assert report["errors"][0]["field"] == field


def test_hostile_files_are_refused_by_name(client: TestClient, tmp_path: Path) -> None:
    for change, reason in CORRUPTIONS.items():
        if change.__name__ not in READ_FROM_VALUES:
            report = check_problem(posted(client, corrupt(tmp_path, change).read_bytes()), 422)
            assert any(part in report["detail"] for part in reason.split("|")), (change.__name__, report["detail"])
            assert str(tmp_path) not in report["detail"]


def test_more_than_a_request_may_hold_is_refused_before_it_is_read(client: TestClient, tmp_path: Path) -> None:
    many = anndata.AnnData(scipy.sparse.csr_matrix((101, 3), dtype=np.float32), var=counted().var)
    assert "101 cells" in check_problem(posted(client, file_of(many, tmp_path)), 422)["detail"]
    many = anndata.AnnData(scipy.sparse.csr_matrix(np.ones((90, 120), np.float32)))
    assert "10,800 counts" in check_problem(posted(client, file_of(many, tmp_path)), 422)["detail"]


def test_features_own_vectors_come_in_every_form(client: TestClient) -> None:
    asked = {"RNA": ["G2", "ENSG00000000000"], "protein": ["CD8"]}
    request = {"counts": PLAIN, "options": {"feature_embeddings": asked}}
    reply = client.post("/v1/embed", json=request).json()["feature_embeddings"]
    assert reply["RNA"] == {
        "features": ["ENSG00000000002", "ENSG00000000000"],
        "embeddings": [[2, 3, 3, 4], [0, 3, 3, 4]],
    }
    assert reply["protein"]["embeddings"] == [[2, 7, 3, 4]]
    packed = {"counts": PLAIN, "options": {"feature_embeddings": asked, "encoding": "base64"}}
    told = client.post("/v1/embed", json=packed).json()["feature_embeddings"]["RNA"]["embeddings"]
    assert unpacked(told).tolist() == reply["RNA"]["embeddings"]
    npz = client.post("/v1/embed", json=request, headers={"Accept": NPZ})
    with np.load(io.BytesIO(npz.content), allow_pickle=False) as arrays:
        assert arrays["feature_embeddings/RNA"].tolist() == reply["RNA"]["embeddings"]
        assert json.loads(arrays["reply"].tobytes())["feature_embeddings"]["RNA"] == {
            "features": reply["RNA"]["features"]
        }
    for names, field in (({"RNA": ["NO"]}, "RNA.0"), ({"smell": ["NO"]}, "smell"), ({"RNA": ["G0"] * 16}, "")):
        bad = client.post("/v1/embed", json={"counts": PLAIN, "options": {"feature_embeddings": names}})
        where = check_problem(bad, 422)["errors"][0]["field"]
        assert where == f"options.feature_embeddings.{field}".rstrip(".")


def test_features_own_vectors_are_the_models(tmp_path: Path) -> None:
    predictor = Predictor.load(write_checkpoint(tmp_path / "checkpoint"))
    own = predictor.model.identity.own.weight.detach().numpy()
    np.testing.assert_array_equal(predictor.vectors("RNA", [3, 0]), own[[4, 1]])  # number 0 is padding
    np.testing.assert_array_equal(predictor.vectors("protein", [2]), own[[43]])
    replica = Replica(ServeSettings(checkpoint=str(tmp_path / "checkpoint")))
    with TestClient(make_app(replica, Limits())) as client:
        options = {"feature_embeddings": {"protein": ["CD2"]}}
        reply = client.post("/v1/embed", json={"counts": {"RNA": [{"G0": 1}]}, "options": options}).json()
    replica.close()
    np.testing.assert_allclose(reply["feature_embeddings"]["protein"]["embeddings"], own[[43]], rtol=1e-6)


class Through(httpx.BaseTransport):
    """Carries requests to an app in this process, and remembers their form."""

    def __init__(self, test_client: TestClient) -> None:
        self.test_client, self.media = test_client, ""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.media = request.headers.get("content-type", "").partition(";")[0]
        path, headers = request.url.raw_path.decode(), dict(request.headers)
        answer = self.test_client.request(request.method, path, content=request.read(), headers=headers)
        return httpx.Response(answer.status_code, content=answer.content, headers=dict(answer.headers))


def test_the_client_sends_arrow_and_files(client: TestClient, tmp_path: Path) -> None:
    file_of(counted(), tmp_path)
    through = Through(client)
    with Client("http://test", transport=through) as asker:
        plain = asker.embed(counted(), prompts={"tissue": "lung"}, features={"RNA": ["G2"]})
        arrow = asker.embed(counted(), prompts={"tissue": "lung"}, features={"RNA": ["G2"]}, encoding="arrow")
        assert through.media == ARROW
        np.testing.assert_array_equal(arrow.values, plain.values)
        assert arrow.features["RNA"][0] == plain.features["RNA"][0] == ["ENSG00000000002"]
        assert arrow.features["RNA"][1].tolist() == plain.features["RNA"][1].tolist() == [[2, 3, 3, 4]]
        named = asker.annotate(tmp_path / "cells.h5ad", top=1)
        assert through.media == "multipart/form-data"
        assert named == asker.annotate(counted(), top=1)
        path = str(tmp_path / "cells.h5ad")
        np.testing.assert_array_equal(asker.embed(path, prompts={"tissue": "lung"}).values, plain.values)
        assert asker.perturb(path, ["G1"])[0].delta.tolist() == asker.perturb(counted(), ["G1"])[0].delta.tolist()


def test_the_examples_of_the_manual_are_answered_alike() -> None:
    section = (Path(__file__).parent.parent / "docs" / "serve.md").read_text().split("## Bodies")[1]
    made: dict[str, Any] = {"io": io, "json": json, "np": np, "pa": pa}
    exec(section.split("```python")[1].split("```")[0].replace("CD3D", "G0"), made)
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    with TestClient(make_app(replica, Limits())) as client:
        plain = client.post("/v1/embed", json={"counts": {"RNA": [{"G0": 4}]}, **made["message"]}).json()
        assert plain["embeddings"] == [[4, 0, 1, 4]]
        for media, content in ((NPZ, made["npz"]), (ARROW, made["arrow"])):
            reply = client.post("/v1/embed", content=content.getvalue(), headers={"Content-Type": media})
            assert reply.json() == plain
    replica.close()


def test_a_body_is_read_within_the_limits_of_its_question() -> None:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    with TestClient(make_app(replica, Limits(cells=1, nonzeros=100))) as client:
        report = check_problem(sent(client, stream(table({}))), 422)
        assert "1 cell" in report["detail"]
        assert sent(client, stream(table({})), "explore").status_code == 200  # 100,000 may be looked at together
    replica.close()
