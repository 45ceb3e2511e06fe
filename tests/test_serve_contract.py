"""The API against its own description: requests made from the OpenAPI schema get no server error, nor one unknown."""

from __future__ import annotations

import pytest
import schemathesis
from fake_predictor import FakePredictor
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.app import make_app
from serve.replica import Replica
from serve.settings import Limits, ServeSettings

REPLICA = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(REPLICA, Limits(cells=50, values=10_000)))
schema = schema.exclude(path="/v1/explore/h5ad")  # takes nothing but files, which are mangled elsewhere


@pytest.fixture(scope="module", autouse=True)
def _closed_afterwards() -> object:
    yield
    REPLICA.close()


@pytest.mark.filterwarnings("ignore:Skipped test cases with unsupported payload")  # other bodies are mangled elsewhere
@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_the_description_allows_gets_no_server_error(case: schemathesis.Case) -> None:
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.call_and_validate(checks=checks)
