"""Who has a token gets in, as often as the owner may ask; nobody else does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_predictor import FakePredictor
from starlette.testclient import TestClient
from test_serve_app import CELLS, check_problem
from test_serve_client import InProcess
from typer.testing import CliRunner

from serve import access
from serve.__main__ import app as command
from serve.access import Purse, read_tokens
from serve.app import make_app
from serve.client import Client
from serve.replica import Replica
from serve.settings import Limits, ServeSettings
from store.errors import InputRefused, MissingError, SettingsError
from store.settings import load_settings, parse_settings

TEAM, APP = "team-" + "x" * 30, "app-" + "y" * 30


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    yield replica
    replica.close()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[team]\ntoken = "{TEAM}"\n\n[app]\ntoken = "{APP}"\nrequests_per_minute = 3\n')
    return path


@pytest.fixture
def client(replica: Replica, tokens: Path) -> Iterator[TestClient]:
    app = make_app(replica, Limits(body_bytes=20_000), read_tokens(str(tokens)))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def asked(client: TestClient, **headers: str) -> Any:
    return client.post("/v1/embed", json={"counts": CELLS}, headers=headers)


def test_only_known_tokens_are_let_in(client: TestClient) -> None:
    assert asked(client, Authorization=f"Bearer {TEAM}").status_code == 200
    assert asked(client, Authorization=f"bearer  {TEAM} ").status_code == 200
    strange = [f"Bearer {TEAM[:-1]}", f"Bearer {TEAM}x", f"Basic {TEAM}", TEAM, "Bearer ", "Bearer \x00\xff"]
    for said in strange:
        response = client.post("/v1/embed", json={"counts": CELLS}, headers={"Authorization": said.encode("latin-1")})
        check_problem(response, 401)
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert TEAM not in response.text
    check_problem(asked(client), 401)
    for path in ("/v1/models", "/openapi.json", "/v1/features"):
        check_problem(client.get(path), 401)
    assert client.get("/v1/health/ready").status_code == 200


def test_the_description_says_which_paths_need_a_token(client: TestClient, replica: Replica) -> None:
    said = client.get("/openapi.json", headers={"Authorization": f"Bearer {TEAM}"}).json()
    assert said["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert said["security"] == [{"token": []}]
    for path, operations in said["paths"].items():
        for method, operation in operations.items():
            needs = operation.get("security", said["security"]) != []
            assert needs == (client.request(method, path).status_code == 401), path
    assert "security" not in make_app(replica, Limits()).openapi()


def test_a_strangers_body_is_not_read(client: TestClient) -> None:
    check_problem(client.post("/v1/embed", content=b"x" * 50_000), 401)


def test_an_owner_may_ask_as_often_as_the_file_says(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    mine = {"Authorization": f"Bearer {APP}"}
    assert [asked(client, **mine).status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = asked(client, **mine)
    assert "app may ask 3 times a minute" in check_problem(refused, 429)["detail"]
    now[0] += int(refused.headers["Retry-After"])
    assert asked(client, **mine).status_code == 200
    assert asked(client, Authorization=f"Bearer {TEAM}").status_code == 200


def test_a_purse_holds_a_minutes_worth_at_most() -> None:
    purse = Purse(b"", 60)
    assert purse.take(purse.seen + 1e6) == 0
    assert purse.left == 59


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token"),
        ('[a]\ntoken = "short"\n', r"a.*token.*at least 24"),
        (f'[a]\ntoken = "{TEAM}"\nrequests = 3\n', "requests"),
        (f'[a]\ntoken = "{TEAM}"\n[b]\ntoken = "{TEAM}"\n', "the same token"),
        (f'token = "{TEAM}"\n', r"write \[OWNER\]"),
        ("not toml", "not TOML"),
        (f'[lab]\ntoken = "{TEAM}\u00e9"\n', "lab: token: only letters"),
        (f'[lab]\ntoken = "{TEAM} {TEAM}"\n', "lab: token: only letters"),
    ],
)
def test_a_file_that_says_something_else_is_refused_without_its_secrets(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=message) as refused:
        read_tokens(str(path))
    assert TEAM not in str(refused.value)
    assert "short" not in str(refused.value)


def test_a_file_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cannot be read"):
        read_tokens(str(tmp_path / "none.toml"))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/manifest.json").write_text("{}")
    words = ["run", str(tmp_path / "checkpoint"), "--tokens", str(tmp_path / "none.toml")]
    assert isinstance(CliRunner().invoke(command, words).exception, MissingError)


def test_the_client_sends_the_token_that_it_is_given_or_that_the_environment_has(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = InProcess(client)
    with Client("http://testserver", token=TEAM, transport=transport) as mine:
        assert mine.models()
    monkeypatch.setenv("SOMAFLOW_TOKEN", TEAM)
    with Client("http://testserver", transport=transport) as mine:
        assert mine.models()
    with Client("http://testserver", token="", transport=transport) as mine, pytest.raises(InputRefused, match="token"):
        mine.models()


def test_scripts_of_named_pages_ask_with_a_token_and_read_refusals(replica: Replica, tokens: Path) -> None:
    page = {"Origin": "https://app.example.org"}
    asks = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    app = make_app(replica, Limits(), read_tokens(str(tokens)), origins=["https://app.example.org"])
    with TestClient(app, raise_server_exceptions=False) as client:
        before = client.options("/v1/embed", headers=asks)
        assert before.status_code == 200, "asked without the token"
        assert before.headers["access-control-allow-origin"] == page["Origin"]
        assert "authorization" in before.headers["access-control-allow-headers"]
        answer = asked(client, Authorization=f"Bearer {TEAM}", **page)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page["Origin"]
        refusal = asked(client, **page)
        check_problem(refusal, 401)
        assert refusal.headers["access-control-allow-origin"] == page["Origin"]
        assert "retry-after" in refusal.headers["access-control-expose-headers"].lower()
        strange = {"Origin": "https://other.example.org"}
        assert client.options("/v1/embed", headers=asks | strange).status_code == 400
        assert "access-control-allow-origin" not in asked(client, Authorization=f"Bearer {TEAM}", **strange).headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("LocalHost", 200),
        ("localhost.:8000", 200),
        ("a.localhost:1", 200),
        ("[::1]:8000", 200),
        ("10.0.0.7", 200),
        ("app.example.org:443", 200),
        ("evil.example.com:8000", 421),
        ("localhost.example.com", 421),
        ("127.0.0.1.example.com", 421),
        ("[::1", 421),
    ],
)
def test_a_server_for_this_machine_answers_to_its_own_names(replica: Replica, host: str, status: int) -> None:
    with TestClient(make_app(replica, Limits(), hosts=["app.example.org"])) as client:
        for path in ("/v1/models", "/", "/metrics"):
            answer = client.get(path, headers={"Host": host})
            assert answer.status_code == status
        if status == 421:
            check_problem(client.get("/v1/models", headers={"Host": host}), 421)
    with TestClient(make_app(replica, Limits(), hosts=["*"])) as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_names_matter_where_only_this_machine_can_ask() -> None:
    here = [ServeSettings(checkpoint="c", host=host, hosts=("App.org",)) for host in ("127.0.0.1", "::1", "localhost")]
    assert [settings.names() for settings in here] == [("app.org",)] * 3
    assert ServeSettings(checkpoint="c").names() == ()
    assert ServeSettings(checkpoint="c", host="0.0.0.0").names() is None
    assert ServeSettings(checkpoint="c", tokens_file="tokens.toml").names() is None


def test_no_page_is_let_in_that_is_not_named(client: TestClient) -> None:
    answer = asked(client, Authorization=f"Bearer {TEAM}", Origin="https://app.example.org")
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    ["app.example.org", "https://app.example.org/page", "https://*.example.org", "https://me@example.org", "null", ""],
)
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"origins.*is no origin; say a scheme, a host and no path: https://app"):
        parse_settings(ServeSettings, {"checkpoint": "c", "origins": [origin]}, where="test")


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ("https://App.Example.org/", "https://app.example.org"),
        ("https://app.example.org:443", "https://app.example.org"),
        ("http://localhost:80", "http://localhost"),
        ("HTTP://localhost:443", "http://localhost:443"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("*", "*"),
    ],
)
def test_an_origin_is_meant_as_browsers_send_it(said: str, sent: str) -> None:
    for origins in ([said], said):
        settings = parse_settings(ServeSettings, {"checkpoint": "c", "origins": origins}, where="test")
        assert settings.origins == (sent,)
    told = load_settings(ServeSettings, overrides=["checkpoint=c", f'origins="{said}"'])
    assert told.origins == (sent,)
