"""What comes back to the client where several ask at once, or nobody answers as it should."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from test_serve_client import MODELS, client_of, counted, served  # noqa: F401 - a fixture

from serve.client import Client, Report
from serve.errors import Unavailable
from store.errors import UsageError


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
