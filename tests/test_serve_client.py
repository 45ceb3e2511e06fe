"""The Python client: what it sends, when it tries again, which error it raises."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import httpx
import mudata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fake_predictor import FakePredictor
from scipy.sparse import csc_matrix, csr_matrix
from starlette.testclient import TestClient

from serve import client as client_module
from serve.app import make_app
from serve.arrow import ARROW
from serve.client import Client, Report
from serve.errors import Overloaded, Unavailable
from serve.given import read_cells
from serve.npz import NPZ, REQUEST
from serve.replica import Replica
from serve.settings import Limits, ServeSettings
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, UsageError
from store.export import MODALITY
from store.schema import MEASUREMENT_OF_MODALITY

mudata.set_options(pull_on_update=False)  # as it will be by itself
MODELS = {"models": [{"id": "tiny"}]}


def client_of(*answers: httpx.Response | Exception, pauses: list[float] | None = None, tries: int = 3) -> Client:
    queue = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        answer = queue.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    kept = pauses if pauses is not None else []
    return Client("http://test", transport=httpx.MockTransport(handle), tries=tries, sleep=kept.append)


def busy(retry_after: str = "3") -> httpx.Response:
    return httpx.Response(429, json={"detail": "full"}, headers={"Retry-After": retry_after})


def body_of(media: str, content: bytes) -> dict[str, Any]:
    """Read what the client sent; of a stream only the message."""
    if media == ARROW:
        return json.loads(pa.ipc.open_stream(content).schema.metadata[REQUEST.encode()])
    if media != NPZ:
        return json.loads(content)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        counts: dict[str, Any] = {}
        for name in arrays.files:
            if name != "request":
                measurement, part = name.split("/")
                counts.setdefault(measurement, {})[part] = (
                    arrays[name].astype(str if part == "features" else None).tolist()
                )
        return json.loads(arrays["request"].tobytes()) | {"counts": counts}


@dataclass(frozen=True)
class Knows:
    """What is told of a model."""

    measurements: tuple[str, ...] = ("RNA", "protein")
    levels: tuple[str, ...] = ("protein",)

    def known(self, measurement: str, names: Sequence[str]) -> int:
        return 0


class InProcess(httpx.BaseTransport):
    """Carries requests to an app in this process."""

    def __init__(self, test_client: TestClient) -> None:
        self.test_client = test_client
        self.bodies: list[dict[str, Any]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        content = request.read()
        if content:
            self.bodies.append(body_of(request.headers["content-type"], content))
        answer = self.test_client.request(
            request.method, request.url.raw_path.decode(), content=content, headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, content=answer.content, headers=dict(answer.headers))


@contextmanager
def serving(limits: Limits) -> Iterator[tuple[Client, InProcess]]:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    with TestClient(make_app(replica, limits)) as test_client:
        transport = InProcess(test_client)
        with Client("http://test", transport=transport, sleep=lambda _: None) as client:
            yield client, transport
    replica.close()


@pytest.fixture
def served() -> Any:
    with serving(Limits()) as both:
        yield both


def test_a_busy_server_is_asked_again_no_sooner_than_it_says() -> None:
    pauses: list[float] = []
    with client_of(busy("3"), busy("5"), httpx.Response(200, json=MODELS), pauses=pauses) as client:
        assert client.models() == MODELS["models"]
    assert pauses[0] >= 3
    assert pauses[1] >= 5


def test_a_server_that_starts_late_is_waited_for() -> None:
    with client_of(httpx.ConnectError("refused"), httpx.Response(200, json=MODELS)) as client:
        assert client.models() == MODELS["models"]


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ([busy()] * 3, Overloaded, "full"),
        ([httpx.ConnectError("refused")] * 3, Unavailable, "is the server running"),
        ([httpx.Response(422, json={"detail": "counts: wrong"})], InputRefused, "counts: wrong"),
        ([httpx.Response(413, json={"detail": "too large"})], InputRefused, "too large"),
        ([httpx.Response(404, json={"detail": "Not Found"})], MissingError, "Not Found"),
        ([httpx.Response(504, json={"detail": "late"})], Unavailable, "late"),
        ([httpx.Response(502, text="<html>")] * 3, Unavailable, "status 502 without a report: <html>"),
        ([httpx.Response(408, text="Request 7 timed out after 60s.")] * 3, Unavailable, "timed out"),
        ([httpx.Response(408, json={"detail": "came too slowly"})], InputRefused, "came too slowly"),
        ([httpx.Response(500, json={"detail": "internal error"})], SomaflowError, "internal error"),
        ([httpx.Response(418)], InputRefused, "status 418 without a report"),
        ([httpx.Response(404, text="nothing")], MissingError, "nothing"),
    ],
)
def test_each_status_has_its_error(answers: list[Any], error: type[Exception], message: str) -> None:
    with client_of(*answers) as client, pytest.raises(error, match=message):
        client.models()


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_an_answer_without_a_report_is_the_servers_trouble_and_asked_again(status: int) -> None:
    pauses: list[float] = []
    plain = httpx.Response(status, text="Internal Server Error")
    with client_of(plain, plain, httpx.Response(200, json=MODELS), pauses=pauses) as client:
        assert client.models() == MODELS["models"]
    assert len(pauses) == 2


def test_readiness_never_raises() -> None:
    with client_of(httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(200)) as client:
        assert [client.ready(), client.ready(), client.ready()] == [False, False, True]


def counted(n_cells: int) -> anndata.AnnData:
    counts = np.arange(n_cells * 3, dtype=np.float32).reshape(n_cells, 3)
    counts[:, 2] = 0
    return anndata.AnnData(csr_matrix(counts), var=pd.DataFrame(index=["G0", "G1", "G2"]))


def test_anndata_is_sent_in_chunks_and_comes_back_whole(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, transport = served
    monkeypatch.setattr(client_module, "CHUNK_CELLS", 4)
    adata = counted(10)
    answer = client.embed(adata, prompts={"tissue": ["blood", "lung"] * 5})
    assert len(transport.bodies) == 3
    assert transport.bodies[0]["counts"]["RNA"]["features"] == ["G0", "G1"]
    assert answer.values[:, 0].tolist() == np.asarray(adata.X.sum(axis=1)).ravel().tolist()
    assert answer.values[:, 2].tolist() == [1, 2] * 5


def test_measurements_side_by_side_and_ids_in_var_are_understood(served: Any) -> None:
    client, _ = served
    rna = counted(2)
    rna.var["feature_id"] = [f"ENSG{i:011d}" for i in range(3)]
    rna.var_names = ["x", "y", "z"]
    protein = (csr_matrix(np.array([[5.0], [0.0]])), ["CD4"])
    answer = client.embed({"RNA": rna, "protein": protein})
    assert answer.values.tolist() == [[1, 5, 0, 0], [7, 0, 0, 3]]


def paired(order: str, cells: str = "abc") -> dict[str, anndata.AnnData]:
    """RNA of cells a, b and c (G0: 1, 2, 3), and protein of some in another order (CD4: 10, 20, 30)."""
    rna = anndata.AnnData(
        csr_matrix([[1.0], [2.0], [3.0]][: len(cells)]), pd.DataFrame(index=list(cells)), pd.DataFrame(index=["G0"])
    )
    counts = csr_matrix([[10.0 * (1 + "abcd".find(cell))] for cell in order])
    return {
        "RNA": rna,
        "protein": anndata.AnnData(counts, pd.DataFrame(index=list(order)), pd.DataFrame(index=["CD4"])),
    }


def test_features_go_by_the_column_of_var_that_the_model_knows_best(served: Any) -> None:
    client, transport = served
    ids = [f"ENSG{i:011d}" for i in range(3)]
    adata = counted(2)
    for column, names in (("gene_ids", [f"ENSG{i:011d}" for i in range(100, 103)]), ("ensembl_id", [*ids[:2], "x"])):
        adata.var[column] = names  # nothing of the first, and fewer of the second
        client.embed(adata)
        assert transport.bodies[-1]["counts"]["RNA"]["features"] == ["G0", "G1"]
    adata.var_names = ["TWIN", "y", "z"]
    client.embed(adata)
    assert transport.bodies[-1]["counts"]["RNA"]["features"] == ids[:2]
    adata.var["feature_id"] = [f"{name}.7" for name in ids]
    client.embed(adata)
    assert transport.bodies[-1]["counts"]["RNA"]["features"] == [f"{name}.7" for name in ids[:2]]


def test_measurements_are_paired_by_the_names_of_their_cells(served: Any) -> None:
    client, _ = served
    expected = [[1, 10, 0, 1], [2, 20, 0, 2], [3, 30, 0, 3]]
    assert client.embed(paired("abc")).values.tolist() == expected
    assert client.embed(paired("cab")).values.tolist() == expected
    shuffled = mudata.MuData(paired("cab"))
    by_name = dict(zip(shuffled.obs_names, client.embed(shuffled).values.tolist(), strict=True))
    assert [by_name[cell] for cell in "abc"] == expected


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (paired("abx"), "1 only in RNA \\('c'\\), 1 only in protein \\('x'\\)"),
        (paired("cab") | {"ATAC": (csr_matrix((3, 1)), ["peak"])}, "different orders"),
        (paired("ab"), "they hold"),
    ],
)
def test_cells_that_cannot_be_paired_are_refused(cells: Any, message: str) -> None:
    with client_of() as client, pytest.raises(InputRefused, match=message):
        client.embed(cells)


def test_modalities_of_mudata_have_their_customary_names(served: Any) -> None:
    client, transport = served
    parts = paired("cab")
    exported = mudata.MuData({"rna": parts["RNA"], "prot": parts["protein"]})
    assert client.embed(exported).values[:, 1].tolist() == [10, 20, 30]
    assert set(transport.bodies[-1]["counts"]) == {"RNA", "protein"}
    parts["protein"].obs_names = parts["RNA"].obs_names
    with pytest.raises(InputRefused, match="rna and gex are RNA both"):
        client.embed(mudata.MuData({"rna": parts["RNA"], "gex": parts["protein"]}))


def test_customary_names_of_modalities_are_those_of_exports() -> None:
    assert {measurement: MEASUREMENT_OF_MODALITY[name] for measurement, name in MODALITY.items()} == {
        measurement: measurement for measurement in MODALITY
    }


@pytest.mark.parametrize("form", [np.asarray, csr_matrix])
def test_of_levels_zeros_are_sent_and_what_is_missing_is_not(form: Any) -> None:
    nan = np.nan
    table = np.array([[0, nan, -1.5], [nan, 0, 2]])
    stored = csr_matrix((np.array([0, -1.5, 0, 2, nan]), [0, 2, 1, 2, 0], [0, 2, 5]), shape=(2, 3))
    values = table if form is np.asarray else stored
    levels = {"RNA": (csr_matrix([[1], [0]]), ["G0"]), "protein": (values, ["a", "b", "c"])}
    sent = read_cells(levels, Knows()).measurements["protein"][0]
    assert [sent.indptr.tolist(), sent.indices.tolist(), sent.data.tolist()] == [
        [0, 2, 4],
        [0, 2, 1, 2],
        [0, -1.5, 0, 2],
    ]
    with pytest.raises(InputRefused, match="RNA: holds values that are not finite"):
        read_cells({"RNA": (values, ["a", "b", "c"])}, Knows())


def test_zeros_that_are_stored_are_sent_as_they_are(served: Any) -> None:
    client, transport = served
    zeros = csr_matrix((np.array([0.0, 3.0]), [0, 1], [0, 2]), shape=(1, 2))
    client.embed({"RNA": (zeros, ["G0", "G1"])})
    client.embed([{"G0": 0, "G1": 3}])
    assert [body["counts"]["RNA"]["data"] for body in transport.bodies] == [[0, 3], [0, 3]]
    client.embed({"RNA": (zeros.toarray(), ["G0", "G1"])})
    assert transport.bodies[-1]["counts"]["RNA"]["data"] == [3]


def cite(antibodies: str = "Antibody Capture") -> anndata.AnnData:
    """Genes G0 and CD4 (1, 2), and an antibody named like the second (50)."""
    var = pd.DataFrame({"feature_types": ["Gene Expression"] * 2 + [antibodies]}, index=["G0", "G1", "antibody"])
    var["feature_id"] = ["G0", "G1", "CD4"]
    return anndata.AnnData(csr_matrix([[1.0, 2.0, 50.0]]), var=var)


def test_features_of_several_types_in_one_anndata_are_several_measurements(served: Any) -> None:
    client, transport = served
    assert client.embed(cite()).values.tolist() == [[3, 50, 0, 1]]
    assert client.embed({"RNA": cite()}).values.tolist() == [[3, 0, 0, 1]]
    assert transport.bodies[-1]["counts"]["RNA"]["features"] == ["G0", "G1"]


def test_features_of_types_that_nobody_can_use_are_left_out_with_a_warning(served: Any) -> None:
    client, _ = served
    with pytest.warns(UserWarning, match="1 features are left out") as caught:
        assert client.embed(cite("Multiplexing Capture")).values.tolist() == [[3, 0, 0, 1]]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="1 features are left out"):
        assert list(read_cells(cite(), Knows(("RNA",))).measurements) == ["RNA"]


@pytest.mark.filterwarnings("ignore:Observation names are not unique")  # that is what is asked
def test_cells_whose_names_repeat_are_paired_in_one_order_only(served: Any) -> None:
    client, _ = served
    assert client.embed(paired("aab", "aab")).values.tolist() == [[1, 10, 0, 1], [2, 10, 0, 2], [3, 20, 0, 3]]
    with pytest.raises(InputRefused, match="several cells 'a'"):
        client.embed(paired("baa", "aab"))


def test_cells_of_mudata_that_lack_a_measurement_are_asked_about_without_it(served: Any) -> None:
    client, transport = served
    partly = mudata.MuData(paired("db"))
    answer = client.embed(partly, prompts={"tissue": ["blood" if cell == "b" else "" for cell in partly.obs_names]})
    by_name = dict(zip(partly.obs_names, answer.values.tolist(), strict=True))
    assert by_name == {"a": [1, 0, 0, 1], "b": [2, 20, 1, 2], "c": [3, 0, 0, 3], "d": [0, 40, 0, 0]}
    assert sorted(list(body["counts"]) for body in transport.bodies) == [["RNA"], ["RNA", "protein"], ["protein"]]
    with pytest.raises(InputRefused, match="was not measured in all"):
        client.perturb(partly, ["G1"])


def test_effects_come_back_as_vectors_over_named_features(served: Any) -> None:
    client, _ = served
    effects = client.perturb([{"G0": 2, "G1": 4}], ["G1", ["G1", "G2"]], top=1)
    assert [effect.perturbation for effect in effects] == ["G1", "G1+G2"]
    assert effects[0].feature_id[1] == "ENSG00000000001"
    assert effects[0].delta.tolist() == [0, -4, 0, 0, 0, 0, 0, 0, 0, 0]
    assert effects[0].top[0]["feature_name"] == "G1"


def test_more_effects_than_a_reply_holds_are_asked_for_in_several() -> None:
    asked = ["G1", ["G1", "G2"], "G2", "G1", "G2+G1"]
    with serving(Limits()) as (client, transport):
        whole = client.perturb([{"G0": 2, "G1": 4}], asked)
        sizes = sum(client.models()[0]["measurements"].values())
        assert [len(body["perturbations"]) for body in transport.bodies] == [5]
    for limits in (Limits(values=2 * 3 * sizes + 1), Limits(perturbations=2)):
        with serving(limits) as (client, transport):
            parts = client.perturb([{"G0": 2, "G1": 4}], asked)
            assert [len(body["perturbations"]) for body in transport.bodies] == [2, 2, 1]
        assert [(one.perturbation, one.measurement) for one in parts] == [
            (one.perturbation, one.measurement) for one in whole
        ]
        assert [one.delta.tolist() for one in parts] == [one.delta.tolist() for one in whole]


def test_types_other_measurements_futures_and_drawn_cells_come_back_in_the_order_of_the_request(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, transport = served
    monkeypatch.setattr(client_module, "CHUNK_CELLS", 2)
    cells = [{"G0": 1}, {"G0": 2, "G1": 1}, {"G0": 3}]
    told = client.annotate(cells, top=1, min_probability=0.9)
    assert [cell["cell_type"] for cell in told] == ["B cell", "unknown", "B cell"]
    predicted = client.translate(cells, "protein", features=["CD3", "CD8"])
    assert len(transport.bodies) == 4
    assert (predicted.feature_id, predicted.unit) == (["P0", "P2"], "count")
    assert predicted.values.tolist() == [[1, 2], [2, 2], [3, 2]]
    later = client.forecast(cells, 1.5, top=1)
    np.testing.assert_allclose(later["RNA"].perturbed, later["RNA"].control + 1.5)
    counts, features = client.generate(3, prompts={"tissue": ["lung", "", "blood"]}, depth=10, seed=4)
    assert features == ["ENSG00000000001", "ENSG00000000002"]
    assert counts.toarray().tolist() == [[14, 2], [14, 0], [14, 1]]
    nothing, features = client.generate(3, depth=1e-50)
    assert (nothing.shape, features) == ((3, 0), [])


@pytest.mark.parametrize(
    "cells", [[], [{}], 7, {"RNA": (csr_matrix((2, 1)), ["G1"]), "protein": (csr_matrix((3, 1)), ["CD4"])}]
)
def test_what_cannot_be_sent_is_refused_here_or_there(served: Any, cells: Any) -> None:
    client, _ = served
    with pytest.raises(InputRefused):
        client.embed(cells)


def by_model(*models: str) -> tuple[Client, list[httpx.Request]]:
    """A client of a server whose model is another at each request: it tells its number as the cells' embedding."""
    queue, asked = list(models), []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=MODELS)
        asked.append(request)
        model = queue.pop(0)
        n_cells = len(body_of(NPZ, request.read())["counts"]["RNA"]["indptr"]) - 1
        reply = {"embeddings": [[float(model)]] * n_cells, "coverage": {}, "warnings": []}
        return httpx.Response(200, json=reply | {"provenance": {"model_sha256": model}})

    return Client("http://test", transport=httpx.MockTransport(handle), sleep=lambda _: None), asked


@pytest.mark.parametrize(
    ("models", "answered"),
    [("111", "111"), ("1222", "222"), ("11222", "222"), ("122333", "333"), ("122334", ""), ("1234567", "")],
)
def test_all_cells_are_answered_by_one_model_though_it_is_changed_meanwhile(
    models: str, answered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CHUNK_CELLS", 1)
    client, asked = by_model(*models)
    with client:
        if answered:
            assert client.embed([{"G0": 1}] * 3).values.ravel().tolist() == [float(one) for one in answered]
        else:
            with pytest.raises(ConflictError, match="changed its model"):
                client.embed([{"G0": 1}] * 3)
    assert len(asked) == len(models)


def test_numbers_of_numpy_are_numbers(served: Any) -> None:
    client, transport = served
    cells = [{"G0": np.int64(1)}, {"G0": np.float32(2)}]
    said = {"time": np.int64(3), "dose": np.array([0.5, 1], np.float32), "tissue": np.array(["lung", ""])}
    for encoding in ("npz", "arrow"):
        client.embed(cells, prompts=said, encoding=encoding)
        assert transport.bodies[-1]["prompts"] == {"time": 3, "dose": [0.5, 1], "tissue": ["lung", ""]}
    client.embed(cells, prompts={"time": np.array([1, 2]), "tissue": pd.Series(["lung", "blood"], index=["b", "a"])})
    assert transport.bodies[-1]["prompts"] == {"time": [1, 2], "tissue": ["lung", "blood"]}
    counts, _ = client.generate(np.int64(2), depth=np.float32(10), seed=np.int64(4), prompts={"time": np.float32(1)})
    assert counts.toarray().tolist() == [[14], [14]]
    assert client.annotate(cells, top=np.int64(1))
    assert client.perturb(cells, np.array(["G1"]), top=np.int64(1))


def backed(folder: Path) -> anndata.AnnData:
    counted(2).write_h5ad(folder / "cells.h5ad")
    return anndata.read_h5ad(folder / "cells.h5ad", backed="r")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda client, _: client.embed([{"G0": 1}], prompts={"tissue": None}), "prompts.tissue: cannot use NoneType"),
        (lambda client, at: client.embed(at / "cells.h5ad", prompts={"tissue": {"a": 1}}), "cannot use dict"),
        (lambda client, _: client.embed([{"G0": 1}], prompts={"time": [{1}]}), "not set"),
        (lambda client, at: client.embed(backed(at)), "to_memory"),
        (lambda client, _: client.embed(anndata.AnnData(var=pd.DataFrame(index=["G0"]))), "has no X; .* layers none"),
        (lambda client, _: client.embed(pd.DataFrame({"G0": ["a"]})), "RNA: cannot use values of type object"),
        (lambda client, _: client.embed([[1, 2]]), "cannot read counts from a list of list"),
        (lambda client, _: client.embed([{"G0": "x"}]), "RNA: could not convert"),
        (lambda client, _: client.embed([{"G0": None}]), "RNA: float"),
        (lambda client, _: client.embed({"RNA": (csr_matrix((1, 2)), ["G0"])}), "1 features for 2 columns"),
        (lambda client, _: client.embed([{}]), "RNA: there are no features"),
        (lambda client, _: client.perturb(anndata.AnnData(np.ones((2, 0))), ["G1"]), "RNA: there are no features"),
        (lambda client, _: client.embed({"RNA": 7}), "cannot read counts from int"),
        (lambda client, _: client.embed({"RNA": (np.ones(2), ["G0"])}), "in 1 dimensions"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(ask: Any, message: str, tmp_path: Path) -> None:
    client, asked = by_model("1")
    with client, pytest.raises(InputRefused, match=message):
        ask(client, tmp_path)
    assert asked == []


@pytest.mark.parametrize(
    "column",
    [
        ["lung", None],
        pd.Series(["lung", np.nan], dtype=object),
        pd.Series(["lung", None], dtype="string"),
        pd.Categorical(["lung", None]),
        np.array([1.0, np.nan], np.float32),
    ],
)
def test_a_cell_of_which_a_prompt_says_nothing_is_named(column: Any) -> None:
    client, asked = by_model("1")
    for ask in (client.embed, lambda cells, **said: client.perturb(cells, ["G1"], **said)):
        with pytest.raises(InputRefused, match=r"prompts\.tissue: cell 1 has no value; say '' for a text"):
            ask([{"G0": 1}, {"G0": 2}], prompts={"tissue": column})
    assert asked == []


def test_a_table_of_cells_and_features_is_rna(served: Any) -> None:
    client, _ = served
    table = pd.DataFrame({"G0": [1, 2], "G1": [0, 5]}, index=["a", "b"])
    assert client.embed(table).values[:, 0].tolist() == [1, 7]
    assert client.embed(table > 0).values[:, 0].tolist() == [1, 2]
    protein = pd.DataFrame({"CD4": [30, 20]}, index=["b", "a"])
    assert client.embed({"RNA": table, "protein": protein}).values[:, :2].tolist() == [[1, 20], [7, 30]]


@pytest.mark.parametrize("dtype", ["float16", ">f4", ">f8", ">i4", ">u2"])
def test_numbers_that_sparse_matrices_cannot_hold_are_sent_as_others(served: Any, dtype: str) -> None:
    client, _ = served
    table = np.array([[1, 0], [2, 5]], dtype)
    by_column = csc_matrix(table.astype(np.float32))
    by_column.data = by_column.data.astype(dtype)
    for given in (table, by_column):
        assert client.embed({"RNA": (given, ["G0", "G1"])}).values[:, 0].tolist() == [1, 7]
    levels = read_cells({"protein": (table, ["CD3", "CD4"])}, Knows()).measurements["protein"][0]
    assert (levels.toarray().tolist(), levels.nnz) == ([[1, 0], [2, 5]], 4)


def test_values_that_are_not_finite_never_leave() -> None:
    client, asked = by_model("1")
    with client, pytest.raises(InputRefused, match="not finite"):
        client.embed([{"G0": float("nan")}])
    assert asked == []


@pytest.mark.parametrize("n_values", [1, 3])
def test_prompts_of_more_or_fewer_cells_than_there_are_are_refused_with_both_numbers(n_values: int) -> None:
    tissue = {"tissue": ["blood"] * n_values}
    with client_of() as client:
        for ask in (client.embed, lambda cells, prompts: client.perturb(cells, ["G1"], prompts=prompts)):
            with pytest.raises(InputRefused, match=f"prompts.tissue: {n_values} values for 2 cells"):
                ask([{"G0": 1}, {"G0": 2}], prompts=tissue)
        with pytest.raises(InputRefused, match=f"{n_values} values for 2 cells"):
            client.generate(2, prompts=tissue)


def test_a_list_of_dictionaries_is_rna() -> None:
    matrix, features = read_cells([{"G1": 1}, {"G2": 2, "G1": 3}], Knows()).measurements["RNA"]
    assert features == ["G1", "G2"]
    assert matrix.toarray().tolist() == [[1, 0], [3, 2]]


def test_nothing_is_retried_that_cannot_succeed() -> None:
    pauses: list[float] = []
    with client_of(httpx.Response(422, json={"detail": "no"}), pauses=pauses) as client, pytest.raises(InputRefused):
        client.models()
    assert pauses == []


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://test", "//test"])
def test_an_address_without_a_scheme_is_refused_at_once(url: str) -> None:
    with pytest.raises(UsageError, match="begin it with http"):
        Client(url)


def test_a_token_is_sent_without_the_line_break_of_its_file_and_refused_where_it_can_be_none() -> None:
    heard: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        heard.append(request.headers["authorization"])
        return httpx.Response(200, json=MODELS)

    with Client("http://test", token=" token\n", transport=httpx.MockTransport(handle)) as client:
        client.models()
    assert heard == ["Bearer token"]
    for token in ("schlüssel", "two\nlines"):
        with pytest.raises(UsageError, match="letters beyond ASCII or line breaks") as refused:
            Client("http://test", token=token)
        assert token not in str(refused.value)


@pytest.mark.parametrize("error", [httpx.UnsupportedProtocol("x"), httpx.LocalProtocolError("Bearer secret")])
def test_what_can_never_be_sent_is_not_tried_again(error: Exception) -> None:
    pauses: list[float] = []
    with client_of(error, pauses=pauses) as client, pytest.raises(UsageError, match="cannot be sent") as refused:
        client.models()
    assert pauses == []
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "answer", [httpx.Response(200, html="<html>please log in</html>"), httpx.Response(200, json=["log in"])]
)
def test_an_answer_that_is_no_message_is_not_of_somaflow(answer: httpx.Response) -> None:
    with client_of(answer) as client, pytest.raises(UsageError, match=r"no somaflow server, .*log in.*the address"):
        client.models()


def test_every_question_says_who_answered_and_how_much_was_understood(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = served
    monkeypatch.setattr(client_module, "CHUNK_CELLS", 1)
    cells = [{"G0": 2}, {"G0": 3, "NOPE": 1}, {"G0": 0.5}, {"G0": 1.5}]
    embedded, predicted = client.embed(cells), client.translate(cells, "protein")
    for told in (embedded, predicted):
        assert told.coverage["RNA"]["share_of_counts"] == 0.75
        assert [warning[:11] for warning in told.warnings] == ["RNA: 100.0%"]
        assert told.provenance["model_sha256"] == "a" * 64
    with pytest.warns(UserWarning, match="no whole numbers") as caught:
        client.annotate(cells)
    assert [warning.filename for warning in caught] == [__file__]
    assert client.last == Report(embedded.coverage, embedded.warnings, embedded.provenance)
    asks: list[Callable[[], Any]] = [
        lambda: client.perturb([{"G0": 1}], ["G1"]),
        lambda: client.forecast([{"G0": 1}], 1.0),
        lambda: client.generate(1),
    ]
    for ask in asks:
        client.last = Report()
        ask()
        assert client.last.provenance == embedded.provenance
        assert client.last.warnings == []


def test_features_are_listed_whole_or_in_part(served: Any) -> None:
    client, _ = served
    assert client.features(at_most=2) == ("RNA", ["ENSG00000000000", "ENSG00000000001"])
    with pytest.raises(InputRefused, match="does not know 'RN A&x=1'"):
        client.features("RN A&x=1")
    assert client.features("protein") == ("protein", ["P0", "P1", "P2"])
