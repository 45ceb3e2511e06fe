"""What comes back to the client where several ask at once, or nobody answers as it should."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from test_serve_client import MODELS, busy, client_of, counted, served  # noqa: F401 - a fixture

from serve.arrow import ARROW
from serve.client import Client, Job, Report
from serve.errors import Overloaded, Unavailable
from serve.npz import NPZ
from store.errors import InputRefused, MissingError, UsageError


@pytest.mark.filterwarnings("error")
def test_an_answer_has_its_own_report_whatever_another_thread_asks(
    served: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, _ = served
    other = Report({}, ["of another"], {})
    monkeypatch.setattr(Client, "last", property(lambda _: other, lambda _, report: None), raising=False)
    for answer in (client.embed(counted(2)), client.translate(counted(2), "protein")):
        assert (list(answer.coverage), answer.warnings) == (["RNA"], [])
    client.annotate(counted(2))  # a warning would be raised


NO_APPLICATION = "Path '/v1/models' not found. Ping http://.../-/routes for available routes."
"""What the proxy of a Ray that starts or ends a server says, with 404."""


def test_a_server_that_rays_proxy_does_not_know_yet_is_waited_for() -> None:
    gone = httpx.Response(404, text=NO_APPLICATION)
    with client_of(gone, gone, httpx.Response(200, json=MODELS)) as client:
        assert client.models() == MODELS["models"]
    with client_of(gone, gone, gone) as client, pytest.raises(Unavailable, match="not found"):
        client.models()


def test_a_server_that_hangs_is_asked_twice_and_said_to_hang() -> None:
    pauses: list[float] = []
    with (
        client_of(*[httpx.ReadTimeout("timed out")] * 6, pauses=pauses, tries=6) as client,
        pytest.raises(Unavailable, match=r"http://test did not answer within 120 s; .* timeout_s$"),
    ):
        client.models()
    assert len(pauses) == 1


@pytest.mark.parametrize("url", ["http://[::", "http://\u2603.example", "http://test:port"])
def test_an_address_that_can_be_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(UsageError, match="is no address of a server"):
        Client(url)


@pytest.mark.parametrize(
    ("retry_after", "timeout_s", "asked_s"),
    [("86400", 120.0, 86_400), ("121", 120.0, 121), ("61", 1.0, 61), ("9" * 5_000, 120.0, 999_999_999)],
)
def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for(
    retry_after: str, timeout_s: float, asked_s: int
) -> None:
    pauses: list[float] = []
    transport = httpx.MockTransport(lambda _: busy(retry_after))
    client = Client("http://test", transport=transport, timeout_s=timeout_s, sleep=pauses.append)
    with client, pytest.raises(Overloaded, match=f"asked again in {asked_s:,} s") as refused:
        client.models()
    assert (refused.value.retry_after_s, pauses) == (asked_s, [])


@pytest.mark.parametrize(
    ("retry_after", "timeout_s", "least_s"),
    [("120", 120.0, 120), ("60", 1.0, 60), ("Wed, 21 Oct 2026 07:28:00 GMT", 120.0, 1), ("\xb2", 120.0, 1)],
)
def test_a_server_that_asks_for_a_wait_that_one_may_have_patience_for_is_waited_for(
    retry_after: str, timeout_s: float, least_s: int
) -> None:
    pauses: list[float] = []
    answers = [httpx.Response(429, headers=[(b"Retry-After", retry_after.encode("latin-1"))])]
    transport = httpx.MockTransport(lambda _: answers.pop() if answers else httpx.Response(200, json=MODELS))
    with Client("http://test", transport=transport, timeout_s=timeout_s, sleep=pauses.append) as client:
        assert client.models() == MODELS["models"]
    assert least_s <= pauses[0] <= least_s + 8


@pytest.mark.parametrize(
    "said", [{"ok": True}, {"object": "list", "data": []}, {"models": []}, {"models": ["a"]}, {"models": [{"id": "a"}]}]
)
def test_another_service_that_answers_with_json_is_not_of_somaflow(said: Any) -> None:
    asks: list[Callable[[Client], Any]] = [
        lambda client: client.embed([{"G0": 1}]),
        lambda client: client.translate([{"G0": 1}], "protein"),
        lambda client: client.perturb([{"G0": 1}], ["G1"]),
        lambda client: client.features(),
        lambda client: client.generate(1),
        lambda client: client.jobs(),
        lambda client: client.job_state("one"),
    ]
    with Client("http://test", transport=httpx.MockTransport(lambda _: httpx.Response(200, json=said))) as client:
        for ask in asks:
            with pytest.raises(UsageError, match=r"no somaflow server, .* holds no '\w+'; look at the address"):
                ask(client)


@pytest.mark.parametrize("media", [NPZ, ARROW])
@pytest.mark.parametrize("content", [b"", b"PK garbage", b"garbage", "cut"])
def test_a_damaged_answer_is_said_to_be_damaged(
    served: Any,  # noqa: F811
    media: str,
    content: Any,
) -> None:
    client, transport = served
    encoding = "arrow" if media == ARROW else "npz"
    whole = transport.handle_request

    def damage(request: httpx.Request) -> httpx.Response:
        answer = whole(request)
        if request.method == "GET":
            return answer
        sent = answer.content[: len(answer.content) // 2] if content == "cut" else content
        return httpx.Response(200, content=sent, headers={"Content-Type": media})

    transport.handle_request = damage
    with pytest.raises(Unavailable, match="http://test/v1/embed: the answer is damaged"):
        client.embed([{"G0": 1}], encoding=encoding)


@pytest.mark.parametrize("job", ["../models", "a?b=c", "one/two", "#"])
def test_a_job_has_the_address_of_its_id_whatever_that_holds(job: str) -> None:
    asked: list[tuple[str, str]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, unquote(request.url.raw_path.decode().removeprefix("/v1/jobs/"))))
        assert request.url.raw_path.count(b"/") == 3
        return httpx.Response(404, json={"detail": "no such job"})

    with Client("http://test", transport=httpx.MockTransport(handle)) as client:
        for ask in (client.job_state, client.cancel_job):
            with pytest.raises(MissingError, match="no such job"):
                ask(job)
    assert asked == [("GET", job), ("DELETE", job)]


def test_a_job_of_a_newer_server_is_one() -> None:
    said = {part.name: 3 if part.type == "int" else part.name for part in fields(Job)}
    with client_of(httpx.Response(200, json=said | {"colour": "red"})) as client:
        assert client.job_state("one") == Job(**said)


def test_a_client_that_is_closed_says_so() -> None:
    client = client_of()
    client.close()
    assert not client.ready()
    with pytest.raises(UsageError, match="is closed"):
        client.models()


def test_a_client_that_is_pickled_is_a_new_one_to_the_same_server() -> None:
    client = Client("http://test", token="t", adapter="lung", timeout_s=7, tries=2)
    client.close()
    again = pickle.loads(pickle.dumps(client))
    assert again._http.base_url == client._http.base_url
    assert again._http.headers["authorization"] == "Bearer t"
    assert (again._adapter, again._http.timeout.read, again._tries) == ({"adapter": "lung"}, 7, 2)
    assert not again._http.is_closed
    again.close()


def test_names_are_texts_and_a_text_is_one_name(served: Any) -> None:  # noqa: F811
    client, transport = served
    cells = [{"G0": 2, "G1": 4}]
    assert [effect.perturbation for effect in client.perturb(cells, "G1")] == ["G1"]
    assert client.translate(cells, "protein", features="CD4").feature_id == ["P1"]
    assert client.embed(cells, features={"RNA": "G3"}).features["RNA"][0] == ["ENSG00000000003"]
    assert client.embed({"RNA": (csr_matrix([[5.0]]), "G0")}).values[0, 3] == 5
    for numbered in ({"RNA": (csr_matrix(np.ones((2, 3))), [0, 1, 2])}, [{0: 1, 1: 1, 2: 1}]):
        with pytest.raises(InputRefused, match="not known: 0, 1, 2"):
            client.embed(numbered)
    asks: list[Callable[[], Any]] = [
        lambda: client.perturb(cells, 3),
        lambda: client.perturb(cells, [3]),
        lambda: client.translate(cells, "protein", features=3),
        lambda: client.neighbors(cells, columns=3),
        lambda: client.embed(cells, features={"RNA": 3}),
        lambda: client.embed({"RNA": (csr_matrix([[1]]), 3)}),
    ]
    transport.bodies.clear()
    for ask in asks:
        with pytest.raises(InputRefused, match="cannot use int as names"):
            ask()
    assert transport.bodies == []
