"""What was done to cells: words that mean several things, and how guides are called."""

from __future__ import annotations

import pandas as pd
import pytest

from ingest.obs import map_obs


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cytokine", ["BDNF", "NT-3", "NT4", "control"]),
        ("drug", ["BDNF", "NT-3", "NT4", "control"]),
        ("CRISPRi", ["BDNF", "control", "control", "control"]),
        ("unknown", ["BDNF", "control", "control", "control"]),
        (None, ["BDNF", "control", "control", "control"]),
    ],
)
def test_a_neurotrophin_is_a_control_only_where_guides_may_be_called_so(kind: str | None, expected: list[str]) -> None:
    obs = pd.DataFrame({"perturbation": ["BDNF", "NT-3", "NT4", "NT-1"]})
    found = map_obs(obs if kind is None else obs.assign(perturbation_type=kind), {})
    assert list(found.frame["perturbation"]) == expected
    asked = "if 'NT-3', 'NT4' is a neurotrophin, say obs.perturbation_type==stimulation"
    assert any(asked in note for note in found.notes) == (kind is None)
    said = map_obs(obs, {"perturbation_type": "=stimulation"})
    assert list(said.frame["perturbation"]) == ["BDNF", "NT-3", "NT4", "control"]
