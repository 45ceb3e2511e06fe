"""Transition heads behind the server: they answer as they do alone, with intervals, and say what they cannot answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from small_checkpoint import write_checkpoint
from starlette.testclient import TestClient
from studies import perturbed
from test_serve_client import InProcess

from serve.app import make_app
from serve.client import Client
from serve.errors import FieldRefused
from serve.head_cards import HeadCard
from serve.replica import Replica
from serve.settings import Limits, ServeSettings
from store.errors import InputRefused
from train.evaluation.context import context_of
from train.evaluation.flow import FlowSettings
from train.evaluation.gated import GatedEffects, TargetVectors
from train.evaluation.head import load_head, save_head
from train.evaluation.study import Study

GENES = 64
QUICK = FlowSettings(steps=20, sets=4, cells=16, width=16, layers=1)
ORDER = np.random.default_rng(0).permutation(GENES)[:60]
"""Which of the checkpoint's genes the heads know, in their own order."""
MEMBERS = {"pathway": ("t0", "never hit")}


def screen(n_targets: int) -> Study:
    cells = perturbed([f"t{number}" for number in range(n_targets)], n_cells=16)
    return Study(cells.counts, {"RNA": [f"ENSG{gene:011d}" for gene in ORDER]}, cells.obs)


def write_head(folder: Path, cells: Study, members: dict[str, tuple[str, ...]]) -> None:
    head = GatedEffects("RNA", targets=TargetVectors(members), settings=QUICK).fit(cells)
    object.__setattr__(head.gate, "g", 0.5 if hasattr(head, "flows") else 0.0)
    save_head(folder, head, members, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    write_checkpoint(folder / "base", n_genes=GENES)
    cells = screen(12)
    write_head(folder / "screen", cells, MEMBERS)
    write_head(folder / "few", screen(2), {})
    write_head(folder / "damaged", screen(2), {})
    (folder / "damaged/head.json").write_text("{}")
    names = [f"other{gene}" for gene in range(60)]
    write_head(folder / "foreign", Study(cells.counts, {"RNA": names}, cells.obs), {})
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    names = ("screen", "few", "damaged", "foreign", "gone")
    replica = Replica(
        ServeSettings(checkpoint=str(folder / "base"), heads={name: str(folder / name) for name in names})
    )
    with TestClient(make_app(replica, Limits()), raise_server_exceptions=False) as client:
        yield client
    replica.close()


COUNTS = np.random.default_rng(1).poisson(2.0, (5, GENES)).astype(np.float32)
CELLS = [{f"ENSG{gene:011d}": float(cell[gene]) for gene in np.flatnonzero(cell)} for cell in COUNTS]


def ask(client: TestClient, **asked: Any) -> Any:
    body = {"counts": {"RNA": CELLS}, "perturbations": ["t1"], "head": "screen", "context": {"cell_type": "a"}}
    return client.post("/v1/perturb", json=body | asked)


def test_vectors_of_a_head_are_bounded_with_their_intervals(folder: Path) -> None:
    """The head knows 60 genes, and tells five values of each."""
    settings = ServeSettings(checkpoint=str(folder / "base"), heads={"screen": str(folder / "screen")})
    replica = Replica(settings)
    with TestClient(make_app(replica, Limits(values=599))) as client:
        assert ask(client, options={"vectors": True}).status_code == 200
        refused = ask(client, perturbations=["t1", "t2"], options={"vectors": True})
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "options.vectors")
        assert "600 values; at most 599" in refused.json()["detail"]
    replica.close()


def test_a_served_head_answers_as_it_does_alone(client: TestClient, folder: Path) -> None:
    head = load_head(folder / "screen")
    own = Study({"RNA": csr_matrix(COUNTS[:, ORDER])}, {"RNA": list(head.table.features)}, screen(1).obs[:5])
    asked = ["t1", "never hit", ["t3", "t0"], f"ENSG{ORDER[0]:011d}", f"G{ORDER[1]}"]
    reply = ask(client, perturbations=asked, options={"vectors": True, "top": 3, "level": 0.8}).json()
    assert reply["provenance"]["head"] == "screen"
    assert reply["features"]["RNA"] == list(head.table.features)
    assert [one["perturbation"] for one in reply["perturbations"]] == [
        "t1",
        "never hit",
        "t0+t3",
        f"ENSG{ORDER[0]:011d}",
        f"G{ORDER[1]}",
    ]
    for one in reply["perturbations"]:
        found = one["effects"]["RNA"]
        low_G, high_G = head.interval(own, one["perturbation"], "a", 0.8)
        np.testing.assert_array_equal(found["delta"], head.predict(own, one["perturbation"], "a").astype(np.float32))
        np.testing.assert_array_equal(found["low"], low_G.astype(np.float32))
        np.testing.assert_array_equal(found["high"], high_G.astype(np.float32))
        np.testing.assert_allclose(np.subtract(found["perturbed"], found["control"]), found["delta"], atol=1e-5)
        first = found["top"][0]
        place = reply["features"]["RNA"].index(first["feature_id"])
        assert first["feature_name"] == f"G{ORDER[place]}"
        assert (first["delta"], first["low"]) == (found["delta"][place], found["low"][place])
    shares = COUNTS[:, ORDER].sum(axis=0)
    np.testing.assert_allclose(found["control"], np.log1p(1e4 * shares / shares.sum()), rtol=1e-5)


def test_surer_intervals_are_wider_and_a_head_that_cannot_tell_says_so(client: TestClient) -> None:
    widths = []
    for level in (0.5, 0.8):
        top = ask(client, options={"level": level}).json()["perturbations"][0]["effects"]["RNA"]["top"]
        widths.append(np.mean([row["high"] - row["low"] for row in top]))
    assert 0 < widths[0] < widths[1]
    reply = ask(client, head="few", options={"vectors": True}).json()
    assert "low" not in reply["perturbations"][0]["effects"]["RNA"]
    assert reply["warnings"] == ["the head held out too few groups to give an interval of level 0.9"]
    assert ask(client, context={"cell_type": "c"}).json()["warnings"] == [
        "the head saw no cells of 'c'; its intervals hold for contexts that it saw"
    ]


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ({"head": "gone"}, "head", "gone cannot be used"),
        ({"head": "damaged"}, "head", "SHA-256 differs"),
        ({"head": "foreign"}, "head", "60 of its 60 features are none of the checkpoint's, such as other0"),
        ({"head": "unheard"}, "head", "this server knows few, screen"),
        ({"head": ""}, "context", "only a head takes it"),
        ({"counts": {"RNA": [{"NOPE": 1}], "protein": [{"P0": 1}]}}, "counts.RNA", "understands too little"),
        ({"context": {}}, "context.cell_type", "this head learned from a, b"),
        ({"context": {"cell_type": "a", "donor": "x"}}, "context.donor", "tells contexts by cell_type"),
        ({"perturbations": ["t1", "t99"]}, "perturbations.1", "knows nothing of 't99'; did you mean"),
        ({"perturbations": [""]}, "perturbations.0", "an empty name is no target"),
        ({"counts": {"protein": [{"P0": 1}]}}, "counts", "answers to RNA"),
        ({"adapter": "lung"}, "adapter", "without its adapters"),
        ({"options": {"level": 1.0}}, "options.level", "less than 1"),
    ],
)
def test_what_a_head_cannot_answer_is_refused(
    client: TestClient, asked: dict[str, Any], field: str, words: str
) -> None:
    reply = ask(client, **asked)
    assert reply.status_code == 422, reply.text
    [problem] = reply.json()["errors"]
    assert problem["field"] == field
    assert words in problem["message"]


def test_a_context_is_said_by_its_labels_whatever_they_hold() -> None:
    known = HeadCard(
        sha256="",
        measurement="RNA",
        columns=("cell_type", "donor_id"),
        contexts=tuple(context_of([kind, "d|1"]) for kind in ("CD4 | naive", "b")),
        by="target",
        hit=(),
        known=frozenset(),
        positions=(),
        baseline="",
        gate=0.0,
    )
    assert known.context({"cell_type": "CD4 | naive"}) == known.contexts[0]
    assert known.context({"cell_type": "b", "donor_id": "d|1"}) == known.contexts[1]
    with pytest.raises(FieldRefused, match=r"this head learned from CD4 \| naive, b"):
        known.context({"donor_id": "d|1"})


def test_heads_are_listed_and_the_client_asks_them(client: TestClient) -> None:
    [card] = client.get("/v1/models").json()["models"]
    assert set(card["heads"]) == {"screen", "few"}
    assert card["heads"]["screen"] | {"sha256": "", "baseline": ""} == {
        "sha256": "",
        "measurement": "RNA",
        "context": ["cell_type"],
        "contexts": ["a", "b"],
        "held_out": "target",
        "perturbed": 12,
        "baseline": "",
        "gate": 0.5,
    }
    assert set(card["heads_refused"]) == {"damaged", "foreign", "gone"}
    [effect] = Client("http://server", transport=InProcess(client)).perturb(
        CELLS, ["never hit"], head="screen", context={"cell_type": "b"}, level=0.8
    )
    assert effect.low is not None
    assert effect.high is not None
    assert (effect.low <= effect.delta).all()
    assert (effect.delta <= effect.high).all()
    assert len(effect.feature_id) == 60
    [plain] = Client("http://server", transport=InProcess(client)).perturb(CELLS, ["G1"])[:1]
    assert plain.low is None


def test_what_a_head_does_not_look_at_is_told_and_what_it_needs_is_asked_for(client: TestClient) -> None:
    said = {"cell_type": "B cell", "organism": "homo_sapiens"}
    assert ask(client, prompts=said).json()["warnings"] == [
        "not used here: cell_type; the head looks at RNA and 'context'"
    ]
    known, unknown = f"ENSG{ORDER[0]:011d}", f"ENSG{min(set(range(GENES)) - set(ORDER.tolist())):011d}"
    refused = ask(client, counts={"RNA": [{unknown: 3.0}]})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "counts.RNA")
    assert "none of the head's features has a count" in refused.json()["detail"]
    few = {"RNA": [{unknown: 99.0, known: 1.0}]}
    assert ask(client, counts=few).json()["warnings"] == ["1% of the counts of RNA are of features that the head knows"]
    assert ask(client, counts=few, options={"min_coverage": 0.0}).json()["warnings"] == []


def test_controls_are_no_target_and_levels_are_of_heads(client: TestClient) -> None:
    for target in ("control", ["control", "t1"]):
        refused = ask(client, head="", context={}, perturbations=[target])
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "perturbations.0"), target
        assert "the cells that are sent are the controls" in refused.json()["detail"]
    bare = {"counts": {"RNA": CELLS}, "options": {"level": 0.5}}
    told = client.post("/v1/forecast", json=bare | {"elapsed": 3.0})
    assert told.json()["warnings"] == ["options.level has no effect: only heads give intervals"]
    known = client.get("/v1/perturbations").json()["perturbations"][:1]
    assert known
    told = client.post("/v1/perturb", json=bare | {"perturbations": known})
    assert told.json()["warnings"] == ["options.level has no effect: only heads give intervals"]


def test_the_client_sends_a_context_also_without_a_head_and_is_refused_as_others(client: TestClient) -> None:
    asking = Client("http://server", transport=InProcess(client))
    with pytest.raises(InputRefused, match="context: only a head takes it"):
        asking.perturb(CELLS, ["G1"], context={"cell_type": "a"})
