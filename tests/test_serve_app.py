"""The HTTP interface over a predictor in this process: answers, limits, problem reports."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_predictor import FakePredictor
from starlette.testclient import TestClient

from serve.app import STATUS, make_app
from serve.decode import Cells
from serve.errors import DeadlineExceeded, Overloaded, StaleModel, Unavailable
from serve.forms import FORMS, form_of
from serve.model import Description, Embed, Question
from serve.npz import NPZ
from serve.replica import Replica
from serve.settings import Batching, Limits, ServeSettings
from store.errors import SomaflowError

CELLS = {"RNA": [{"G0": 1, "G1": 4}, {"G2": 2, "NOPE": 1}]}


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    settings = ServeSettings(checkpoint="fake", batching=Batching(budget_tokens=64, piece_tokens=16))
    replica = Replica(settings, lambda _: FakePredictor())
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def client(replica: Replica) -> Iterator[TestClient]:
    limits = Limits(body_bytes=20_000, cells=100, perturbations=4)
    with TestClient(make_app(replica, limits), raise_server_exceptions=False) as client:
        yield client


class Failing:
    """A model that raises what it is told to."""

    def __init__(self, real: Replica, error: Exception) -> None:
        self.real, self.error, self.asked = real, error, 0

    async def ready(self) -> str:
        return await self.real.ready()

    async def describe(self) -> Description:
        self.asked += 1
        return await self.real.describe()

    async def ask(self, cells: Cells, question: Question) -> Any:
        raise self.error


def check_problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    report = response.json()
    assert report["status"] == status
    assert report["type"] == f"urn:somaflow:problem:{status}"
    assert "Traceback" not in response.text
    return report


def test_embed_answers_each_cell_in_order_with_coverage_and_provenance(client: TestClient) -> None:
    reply = client.post("/v1/embed", json={"counts": CELLS, "prompts": {"tissue": ["", "lung"]}}).json()
    assert reply["embeddings"] == [[5, 0, 0, 1], [2, 0, 2, 0]]
    assert reply["coverage"]["RNA"]["unmapped"] == ["NOPE"]
    assert reply["provenance"] == {
        "model_sha256": "a" * 64,
        "vocabulary_hash": "b" * 64,
        "global_step": 7,
        "snapshot_name": "tiny",
        "snapshot_id": "c" * 64,
        "commit_id": "d" * 64,
    }


def test_a_request_cut_into_many_pieces_comes_back_in_order(client: TestClient) -> None:
    cells = [{f"G{feature}": cell + 1 for feature in range(cell % 8 + 1)} for cell in range(100)]
    reply = client.post("/v1/embed", json={"counts": {"RNA": cells}}).json()
    assert reply["embeddings"] == [[sum(cell.values()), 0, 0, cell["G0"]] for cell in cells]


def test_binary_and_normalised_embeddings_are_the_same_numbers(client: TestClient) -> None:
    plain = np.array(client.post("/v1/embed", json={"counts": CELLS}).json()["embeddings"], dtype=np.float32)
    options = {"encoding": "base64", "normalize": True, "dtype": "float16"}
    tensor = client.post("/v1/embed", json={"counts": CELLS, "options": options}).json()["embeddings"]
    values = np.frombuffer(base64.b64decode(tensor["base64"]), dtype="<f2").reshape(tensor["shape"])
    assert tensor["dtype"] == "float16"
    np.testing.assert_allclose(values, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-3)


def test_annotate_lists_types_names_what_covers_them_and_may_not_know(client: TestClient) -> None:
    cells = [{"G0": 3}, {"G0": 1, "G1": 2}]
    options = {"top": 2, "cover": 0.85, "min_probability": 0.7}
    first, second = client.post("/v1/annotate", json={"counts": {"RNA": cells}, "options": options}).json()["cells"]
    assert (first["cell_type"], first["covering"], first["covering_id"]) == ("B cell", "B cell", "CL:0000236")
    assert second["cell_type"] == "unknown"
    assert [one["cell_type"] for one in second["types"]] == [
        "CD8-positive, alpha-beta T cell",
        "CD4-positive, alpha-beta T cell",
    ]
    assert [round(one["probability"], 3) for one in second["types"]] == [0.6, 0.3]
    assert (second["covering"], second["covering_id"]) == ("mature alpha-beta T cell", "CL:0000791")


def test_a_cell_of_no_known_kind_is_called_unknown(client: TestClient) -> None:
    cells = {"RNA": [{"G0": 3}, {"G0": 300}]}
    for least, expected in ((0.0, ["B cell", "B cell"]), (0.01, ["B cell", "unknown"])):
        reply = client.post("/v1/annotate", json={"counts": cells, "options": {"min_novelty_p": least}}).json()
        assert [cell["cell_type"] for cell in reply["cells"]] == expected
        assert [round(cell["novelty_p"], 4) for cell in reply["cells"]] == [0.5, 0.001]
        assert not reply["warnings"]


def test_translate_gives_the_features_that_were_asked_for(client: TestClient) -> None:
    cells = {"RNA": [{"G0": n + 1, "G1": 1} for n in range(40)]}
    request = {"counts": cells, "measurement": "protein", "options": {"features": ["CD8", "P0"]}}
    reply = client.post("/v1/translate", json=request).json()
    assert (reply["features"], reply["unit"]) == (["P2", "P0"], "count")
    assert reply["values"] == [[2, n + 1] for n in range(40)]
    assert len(client.post("/v1/translate", json=request | {"options": {}}).json()["values"][0]) == 3
    report = check_problem(client.post("/v1/translate", json=request | {"measurement": "ATAC"}), 422)
    assert report["errors"][0]["field"] == "measurement"
    report = check_problem(client.post("/v1/translate", json=request | {"options": {"features": ["P0", "CD9"]}}), 422)
    assert report["errors"][0]["field"] == "options.features.1"


def test_more_values_than_a_reply_may_hold_are_refused(replica: Replica) -> None:
    with TestClient(make_app(replica, Limits(values=5))) as client:
        request = {"counts": CELLS, "measurement": "protein"}
        assert "6 values" in check_problem(client.post("/v1/translate", json=request), 422)["detail"]
        assert client.post("/v1/translate", json=request | {"options": {"features": ["P0"]}}).status_code == 200
        assert "too many" in check_problem(client.post("/v1/generate", json={"cells": 20}), 422)["detail"]


@pytest.mark.parametrize(
    ("organism", "feature"),
    [
        ("homo_sapiens", "ENSG00000000099"),
        (["mus_musculus"] * 2, "ENSMUSG00000000099"),
        ("", ""),
        (["mus_musculus", "homo_sapiens"], ""),
    ],
)
def test_a_shared_symbol_that_is_asked_for_is_the_gene_of_the_organism_that_all_cells_are_of(
    client: TestClient, organism: Any, feature: str
) -> None:
    about = {"counts": CELLS, "prompts": {"organism": organism}}
    named = {"options": {"features": ["TWIN"]}, "measurement": "RNA"}
    vectors = {"options": {"feature_embeddings": {"RNA": ["TWIN"]}}}
    replies = [client.post("/v1/translate", json=about | named), client.post("/v1/embed", json=about | vectors)]
    if feature:
        assert replies[0].json()["features"] == [feature]
        assert replies[1].json()["feature_embeddings"]["RNA"]["features"] == [feature]
        return
    for reply in replies:
        assert reply.status_code == 422
        assert "'TWIN': several features carry this name" in reply.json()["detail"]
        assert "or say one organism of all cells" in reply.json()["detail"]


def test_effects_with_more_vectors_than_a_reply_may_hold_are_refused(replica: Replica) -> None:
    """The model knows 10 genes and 3 proteins: 39 values for each perturbation, and now and later."""
    with TestClient(make_app(replica, Limits(values=78))) as client:
        request = {"counts": CELLS, "perturbations": ["G1", "G2", "G1"], "options": {"vectors": True}}
        report = check_problem(client.post("/v1/perturb", json=request), 422)
        assert report["errors"][0]["field"] == "options.vectors"
        assert "117 values; at most 78" in report["detail"]
        assert "name fewer perturbations" in report["detail"]
        for change in ({"perturbations": ["G1", "G2"]}, {"options": {}}):
            assert client.post("/v1/perturb", json=request | change).status_code == 200
        later = {"counts": CELLS, "elapsed": 1.0, "options": {"vectors": True}}
        assert client.post("/v1/forecast", json=later).status_code == 200
    with TestClient(make_app(replica, Limits(values=38))) as client:
        assert "39 values" in check_problem(client.post("/v1/forecast", json=later), 422)["detail"]
        assert client.post("/v1/forecast", json=later | {"options": {}}).status_code == 200


def test_forecast_tells_now_and_later(client: TestClient) -> None:
    cells = [{"G0": 1}, {"G0": 3}] * 20
    request = {"counts": {"RNA": cells}, "elapsed": 2.5, "options": {"top": 1, "vectors": True}}
    reply = client.post("/v1/forecast", json=request).json()
    effect = reply["effects"]["RNA"]
    assert (reply["cells"], effect["control"][0], effect["perturbed"][0]) == (40, 2, 4.5)
    check_problem(client.post("/v1/forecast", json=request | {"elapsed": 0}), 422)


def test_generate_draws_cells_from_what_is_said(client: TestClient) -> None:
    request = {"prompts": {"tissue": ["lung", "", "blood"]}, "cells": 3, "depth": 10.0, "seed": 4}
    counts = client.post("/v1/generate", json=request).json()["counts"]
    assert counts["features"] == ["ENSG00000000001", "ENSG00000000002"]
    assert (counts["indptr"], counts["data"]) == ([0, 2, 3, 5], [14, 2, 14, 14, 1])
    check_problem(client.post("/v1/generate", json=request | {"cells": 4}), 422)
    check_problem(client.post("/v1/generate", json=request | {"cells": 101, "prompts": {}}), 422)
    assert client.post("/v1/generate", json={}).status_code == 200


def test_perturb_averages_over_all_cells_and_ranks_by_change(client: TestClient) -> None:
    cells = [{"G0": 1, "G1": 4, "G2": 1}, {"G1": 2, "G2": 3}] * 10
    request = {"counts": {"RNA": cells}, "perturbations": ["G1", ["G2", "G1"]], "options": {"top": 2, "vectors": True}}
    reply = client.post("/v1/perturb", json=request).json()
    single, double = reply["perturbations"]
    assert (single["perturbation"], double["perturbation"]) == ("G1", "G1+G2")
    assert single["effects"]["RNA"]["top"][0] == {
        "feature_id": "ENSG00000000001",
        "feature_name": "G1",
        "control": 3,
        "perturbed": 0,
        "delta": -3,
    }
    assert double["effects"]["RNA"]["delta"][:4] == [0, -3, -2, 0]
    assert double["effects"]["RNA"]["control"][:4] == [0.5, 3, 2, 0]
    assert reply["features"]["RNA"][1] == "ENSG00000000001"
    assert reply["cells"] == 20


@pytest.mark.parametrize("named", ["G2+G1", ["G1", "G2"], ["G1+G2", "G1"], ["G2+G1+G2"]])
def test_targets_that_are_hit_together_count_once_each(client: TestClient, named: Any) -> None:
    reply = client.post("/v1/perturb", json={"counts": CELLS, "perturbations": [named]}).json()
    assert [one["perturbation"] for one in reply["perturbations"]] == ["G1+G2"]


def test_effects_are_short_unless_vectors_are_asked_for(client: TestClient) -> None:
    reply = client.post("/v1/perturb", json={"counts": CELLS, "perturbations": ["G1"]}).json()
    assert set(reply["perturbations"][0]["effects"]["RNA"]) == {"top"}
    assert reply["features"] == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"perturbations": ["G7"]}, "perturbations.0"),
        ({"perturbations": ["G1", []]}, "perturbations.1"),
        ({"perturbations": [""]}, "perturbations.0"),
        ({"perturbations": [["G1+"]]}, "perturbations.0"),
        ({"perturbations": ["G1"] * 5}, "perturbations"),
        ({"prompts": {"perturbation": "G1"}}, "prompts.perturbation"),
    ],
)
def test_a_perturbation_that_cannot_be_asked_is_named(client: TestClient, change: dict[str, Any], field: str) -> None:
    report = check_problem(client.post("/v1/perturb", json={"counts": CELLS, "perturbations": ["G1"]} | change), 422)
    assert report["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "counts"),
        ({"counts": {}}, "counts"),
        ({"counts": CELLS, "colour": "red"}, "colour"),
        ({"counts": {"RNA": [{"G1": "4"}]}}, "counts.RNA.0.G1"),
        ({"counts": {"RNA": {"features": ["G1"], "indptr": [0, 1], "indices": [0]}}}, "counts.RNA.data"),
        ({"counts": {"RNA": 4}}, "counts.RNA"),
        ({"counts": {"RNA": [{"G1": -4}]}}, "counts.RNA.0.G1"),
        ({"counts": CELLS, "options": {"encoding": "morse"}}, "options.encoding"),
        ([], "body"),
    ],
)
def test_a_request_that_is_wrong_is_answered_with_the_path_of_the_field(
    client: TestClient, body: Any, field: str
) -> None:
    report = check_problem(client.post("/v1/embed", json=body), 422)
    assert report["errors"][0]["field"] == field, report


def test_numbers_that_json_does_not_have_are_refused(client: TestClient) -> None:
    for text in ("NaN", "Infinity", "1e999", "1" * 400, "1" * 5_000):
        body = f'{{"counts": {{"RNA": [{{"G1": {text}}}]}}}}'
        response = client.post("/v1/embed", content=body, headers={"Content-Type": "application/json"})
        check_problem(response, 400 if len(text) == 5_000 else 422)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[" * 10_000, b'{"counts": ' + b'{"a":' * 3_000])
def test_a_body_that_is_not_json_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/embed", content=body, headers={"Content-Type": "application/json"})
    check_problem(response, response.status_code)
    assert response.status_code in (400, 422)


def test_another_content_type_is_refused(client: TestClient) -> None:
    body = json.dumps({"counts": CELLS}).encode()
    check_problem(client.post("/v1/embed", content=body, headers={"Content-Type": "text/plain"}), 415)


def test_a_thousand_wrong_values_give_a_short_report_without_the_payload(client: TestClient) -> None:
    report = check_problem(client.post("/v1/embed", json={"counts": {"RNA": [{"G1": "secret"}] * 500}}), 422)
    assert len(json.dumps(report)) < 2_000
    assert "secret" not in json.dumps(report)


def test_a_body_over_the_limit_is_answered_before_it_is_read(replica: Replica) -> None:
    app = make_app(replica, Limits(body_bytes=1_000))
    read: list[int] = []
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
        return {
            "type": "http",
            "method": "POST",
            "path": "/v1/embed",
            "raw_path": b"/v1/embed",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "headers": [(b"content-type", b"application/json"), *headers],
        }

    asyncio.run(app(scope((b"content-length", b"999999999999")), receive, send))
    assert (sent[0]["status"], read) == (413, [])
    assert json.loads(sent[1]["body"])["status"] == 413
    sent.clear()
    asyncio.run(app(scope(), receive, send))  # no length given: counted while it comes
    assert (sent[0]["status"], len(read)) == (413, 3)


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", 3), 429, "3"),
        (DeadlineExceeded("late"), 504, None),
        (Unavailable("starting"), 503, "1"),
        (StaleModel("changed"), 503, "1"),
        (SomaflowError("a secret detail"), 500, None),
        (RuntimeError("a secret detail"), 500, None),
    ],
)
def test_each_error_has_its_status(replica: Replica, error: Exception, status: int, retry_after: str | None) -> None:
    with TestClient(make_app(Failing(replica, error), Limits()), raise_server_exceptions=False) as client:
        response = client.post("/v1/embed", json={"counts": CELLS})
    report = check_problem(response, status)
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in json.dumps(report)


def test_in_the_table_of_statuses_no_class_hides_behind_its_parent() -> None:
    kinds = list(STATUS)
    for position, kind in enumerate(kinds):
        assert not any(issubclass(kind, earlier) for earlier in kinds[:position]), kind


def test_a_changed_checkpoint_is_described_anew(replica: Replica) -> None:
    model = Failing(replica, StaleModel("changed"))
    with TestClient(make_app(model, Limits())) as client:
        client.get("/v1/features")
        client.get("/v1/prompts")
        assert model.asked == 1
        check_problem(client.post("/v1/embed", json={"counts": CELLS}), 503)  # read for the new one, and again refused
        assert model.asked == 2
        client.get("/v1/features")
        assert model.asked == 3


def test_unknown_addresses_and_methods_are_problems_too(client: TestClient) -> None:
    check_problem(client.get("/v1/nothing"), 404)
    check_problem(client.get("/v1/embed"), 405)
    check_problem(client.get("/docs"), 404)


def test_addresses_with_a_slash_behind_are_no_others(client: TestClient) -> None:
    check_problem(client.get("/v1/models/", follow_redirects=False), 404)


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/v1/health/live", "/v1/models", "/openapi.json", "/v1/embed"])
def test_head_is_answered_as_get_without_the_body(client: TestClient, path: str) -> None:
    told, whole = client.head(path), client.get(path)
    assert (told.status_code, told.content) == (whole.status_code, b"")
    assert told.status_code == (405 if path == "/v1/embed" else 200)
    assert told.headers["content-type"] == whole.headers["content-type"]
    assert told.headers["content-length"] == whole.headers["content-length"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", "GET, HEAD, POST"),
        ("PUT", "/v1/jobs/one", "DELETE, GET, HEAD"),
        ("POST", "/v1/explore/one", "DELETE, GET, HEAD"),
        ("GET", "/v1/embed", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
    ],
)
def test_who_uses_a_wrong_method_is_told_all_that_the_address_takes(
    client: TestClient, method: str, path: str, allowed: str
) -> None:
    reply = client.request(method, path)
    check_problem(reply, 405)
    assert reply.headers["Allow"] == allowed


def test_what_was_not_drawn_is_an_answer_without_features_as_the_description_says(client: TestClient) -> None:
    reply = client.post("/v1/generate", json={"cells": 2, "depth": 1e-50}).json()
    assert reply["counts"] == {"features": [], "indptr": [0, 0, 0], "indices": [], "data": []}
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    drawn = schemas[schemas["GenerateReply"]["properties"]["counts"]["$ref"].rpartition("/")[2]]["properties"]
    assert "minItems" not in drawn["features"]


def test_openapi_names_every_form_that_cells_come_in(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/embed", "/v1/explore"):
        assert set(paths[path]["post"]["requestBody"]["content"]) == set(FORMS)


def test_the_model_says_what_it_knows(client: TestClient) -> None:
    card = client.get("/v1/models").json()["models"][0]
    assert card["measurements"] == {"RNA": 10, "protein": 3}
    assert (card["id"], card["embedding_size"]) == ("tiny-" + "a" * 12, 4)
    page = client.get("/v1/features", params={"measurement": "RNA", "offset": 8, "limit": 5}).json()
    assert [feature["organism"] for feature in page["features"]] == ["homo_sapiens", "mus_musculus"]
    assert client.get("/v1/perturbations").json()["perturbations"] == ["G1", "G2"]
    assert client.get("/v1/prompts").json()["prompts"]["tissue"] == ["blood", "lung"]
    check_problem(client.get("/v1/features", params={"measurement": "smell"}), 422)
    check_problem(client.get("/v1/features", params={"limit": 0}), 422)


def test_health_follows_the_model() -> None:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    with TestClient(make_app(replica, Limits())) as client:
        assert client.get("/v1/health/ready").json() == {"status": "ready"}
        replica.close()
        check_problem(client.get("/v1/health/ready"), 503)
        assert client.get("/v1/health/live").json() == {"status": "live"}


def test_every_example_in_the_openapi_document_is_a_valid_request(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for name in ("EmbedRequest", "PerturbRequest"):
        assert document["components"]["schemas"][name]["examples"]
    from serve.messages import EmbedRequest, PerturbRequest

    for model in (EmbedRequest, PerturbRequest):
        for example in document["components"]["schemas"][model.__name__]["examples"]:
            model.model_validate(example)


def test_answers_do_not_depend_on_what_shares_the_batch(replica: Replica) -> None:
    def cells(*counts: int, protein: bool = False) -> Cells:
        from serve.decode import Decoder

        fake = FakePredictor()
        decoder = Decoder(fake.vocabulary, fake.prompts, "a" * 64, Limits())
        request: dict[str, Any] = {"RNA": [{"G0": count} for count in counts]}
        if protein:
            request["protein"] = [{"CD4": 1} for _ in counts]
        return decoder.decode(request, {}).cells

    async def scenario() -> list[Any]:
        asked = [cells(number + 1, number + 2, protein=number % 2 == 0) for number in range(40)]
        return await asyncio.gather(*(replica.ask(part, Embed()) for part in asked))

    for number, answer in enumerate(asyncio.run(scenario())):
        protein = 1 - number % 2
        assert answer.tolist() == [[number + 1, protein, 0, number + 1], [number + 2, protein, 0, number + 2]]


def test_a_vector_that_float16_cannot_hold_is_refused_not_infinite(client: TestClient) -> None:
    request = {"counts": {"RNA": [{"G0": 70_000}]}, "options": {"dtype": "float16"}}
    assert "float32" in check_problem(client.post("/v1/embed", json=request), 422)["detail"]
    assert client.post("/v1/embed", json=request | {"options": {}}).json()["embeddings"] == [[70_000, 0, 0, 70_000]]


# ------------------------------------------------------------------ what requests and replies are told
def test_broken_json_is_400_with_the_place_in_the_text(client: TestClient) -> None:
    sent = {"content": b'{"counts": }', "headers": {"Content-Type": "application/json"}}
    for path in ("embed", "generate"):
        report = check_problem(client.post(f"/v1/{path}", **sent), 400)
        assert report["detail"].startswith("the body is not valid JSON at character 11")
        assert not report["errors"]


def test_a_packed_body_is_refused_by_the_name_of_its_packing(client: TestClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    report = check_problem(client.post("/v1/embed", content=gzip.compress(b"{}"), headers=headers), 415)
    assert "'gzip'" in report["detail"]
    identity = {"Content-Encoding": "identity"}
    assert client.post("/v1/embed", json={"counts": CELLS}, headers=identity).status_code == 200


def test_a_wrong_form_is_told_the_forms_that_its_route_takes(client: TestClient) -> None:
    for path, forms in {"embed": 4, "explore": 4, "generate": 1, "jobs": 1, "explore/dataset": 1}.items():
        for media in ("text/plain", "application/x-npz") if forms == 1 else ("text/plain",):
            report = check_problem(client.post(f"/v1/{path}", content=b"{}", headers={"Content-Type": media}), 415)
            assert report["detail"].count(" or ") == forms - 1, report["detail"]


def test_effects_are_told_by_the_names_of_the_request(client: TestClient) -> None:
    asked: list[Any] = ["G2+G1", ["G2", "G1"], ["G1", "G1"]]
    reply = client.post("/v1/perturb", json={"counts": CELLS, "perturbations": asked}).json()
    assert [one["asked"] for one in reply["perturbations"]] == ["G2+G1", "G2+G1", "G1+G1"]
    assert [one["perturbation"] for one in reply["perturbations"]] == ["G1+G2", "G1+G2", "G1"]


def test_numbers_that_may_be_said_are_listed(client: TestClient) -> None:
    assert client.get("/v1/prompts").json()["numbers"] == ["time", "dose"]
    assert client.get("/v1/prompts").json()["units"] == {}
    card = client.get("/v1/models").json()["models"][0]
    assert {"time", "dose", "tissue"} <= set(card["prompts"])


def test_the_card_tells_what_one_request_may_hold(client: TestClient) -> None:
    limits = client.get("/v1/models").json()["models"][0]["limits"]
    assert (limits["cells"], limits["body_bytes"], limits["values"]) == (100, 20_000, Limits().values)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", ""),
        ("*/*", ""),
        (NPZ, NPZ),
        (f"{NPZ}, application/json", NPZ),
        (f"application/json, {NPZ}", ""),
        (f"{NPZ};q=0, application/json", ""),
        (f"{NPZ}; q=0.0", ""),
        (f"{NPZ};q=0.2, application/json;q=0.9", ""),
        (f"application/json;q=0.2, {NPZ};q=0.9", NPZ),
        (f"{NPZ};q=nonsense", NPZ),
    ],
)
def test_a_reply_has_the_form_that_is_liked_best(accept: str, form: str) -> None:
    assert form_of(accept) == form
