"""What was done to cells: words that mean several things, and how guides are called."""

from __future__ import annotations

import pandas as pd
import pytest

from ingest.obs import map_obs
from ingest.perturbations import guide_target, perturbation_name


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


@pytest.mark.parametrize(
    ("guide", "target"),
    [
        *(
            (gene, gene)
            for gene in ("Stag2", "Ing1", "Reg1", "Eif4g1", "Pla2g5", "Tsg101", "Eg5", "NKX2.1", "AC012345.1")
        ),
        *(
            (guide, "ATF2")
            for guide in ("ATF2g1", "ATF2sg1", "ATF2_sg1", "ATF2-g2", "ATF2guide3", "sgATF2", "sgATF2_2")
        ),
        *((guide, "Stag2") for guide in ("Stag2_g1", "Stag2_sg2", "Stag2_1", "sgStag2_1", "Stag2-guide1", "Stag2.1")),
        ("NKX2.1_2", "NKX2.1"),
        ("NKX2.1g2", "NKX2.1"),
        ("C1orf112g2", "C1orf112"),
        ("STAT1.2", "STAT1"),
        ("ENSG00000141510.17", "ENSG00000141510"),
        ("sgKLF1-1", "KLF1-1"),
        ("sgNTC", "control"),
        ("sgk1", "sgk1"),
        ("TP53_+_7676520.23-P1P2", "TP53"),
        ("TP53_-_7676520.23-P1P2|TP53_+_7676594.23-P1P2", "TP53"),
        ("TP53_-_7676520.23-P1P2+KLF1_+_12997790.23-ENST00000264834.4", "KLF1+TP53"),
        ("TP53_+_7676520.23-P1P2|non-targeting_00001", "TP53"),
    ],
)
def test_a_guides_target_is_a_gene_and_all_of_its_name(guide: str, target: str) -> None:
    assert perturbation_name(guide_target(guide)) == target
    frame = map_obs(pd.DataFrame({"guide_id": [guide, "non-targeting"]}), {}).frame
    assert frame["perturbation"].tolist() == [target, "control"]


def test_a_guides_place_in_the_genome_is_no_target_where_a_column_of_targets_holds_it() -> None:
    assert perturbation_name("TP53_+_7676520.23-P1P2") == "TP53"
    assert perturbation_name("KLF1+TP53") == "KLF1+TP53"
