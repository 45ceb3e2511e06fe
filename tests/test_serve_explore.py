"""Cells that are looked at together: opened, laid out, asked about, let go."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import importlib.abc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import httpx
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from encoded import add_dataset, encoded_counts
from fake_predictor import FakePredictor, FakeVocabulary
from hostile_files import CORRUPTIONS, corrupt, honest
from starlette.testclient import TestClient
from test_serve_app import check_problem
from test_serve_foreign import READ_FROM_VALUES

from serve import h5ad, sources
from serve.app import make_app
from serve.desk import Desk
from serve.errors import FieldRefused, Overloaded, StaleModel
from serve.explore import Offer, _frame, _label
from serve.explored import ExploreRequest
from serve.foreign import translate
from serve.h5ad import FORM
from serve.messages import EmbedRequest
from serve.npz import NPZ, REQUEST, write_npz
from serve.payload import read_request
from serve.projection import principal, project
from serve.replica import Replica
from serve.sessions import Sessions
from serve.settings import Explore, Limits, ServeSettings
from serve.sources import Read, check_sources, read_h5ad_cells, read_snapshot_cells
from store.errors import InputRefused, MissingError
from store.snapshot import SnapshotSettings, create_snapshot
from store.writer import LakeWriter

ROOT = Path(__file__).parent.parent
TWELVE: dict[str, Any] = {
    "counts": {"RNA": [{"G0": i + 1} if i % 2 else {"G0": i + 1, "G1": i} for i in range(12)]},
    "labels": {"side": ["left", "right"] * 6, "age": [float(i) for i in range(12)]},
}


def array(tensor: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(tensor["base64"]), tensor["dtype"])
    return flat.reshape(tensor["shape"])


def replica_of(predictor: FakePredictor | None = None) -> Replica:
    return Replica(ServeSettings(checkpoint="fake"), lambda _: predictor or FakePredictor())


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    replica = replica_of()
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adata = anndata.AnnData(np.arange(60, dtype=np.float32).reshape(6, 10) + 1)
    adata.var_names = [f"ENSG{i:011d}" for i in range(8)] + ["ENSG00000000099", "unheard-of"]
    adata.obs["side"] = pd.Categorical(["left", "right"] * 3)
    adata.obs["depth"] = np.arange(6)
    adata.obs["remark"] = [f"remark {i}" for i in range(6)]
    path = tmp_path_factory.mktemp("offered") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def client(replica: Replica, cells: Path) -> Iterator[TestClient]:
    with TestClient(make_app(replica, Limits(body_bytes=200_000), offer=Offer({"six": str(cells)}))) as client:
        yield client


def until_ready(client: TestClient, session: dict[str, Any], timeout_s: float = 60) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    while session["state"] != "ready":
        assert time.monotonic() < end, session
        time.sleep(0.02)
        response = client.get(f"/v1/explore/{session['session']}")
        assert response.status_code == 200, response.text
        session = response.json()
    return session


def refusal(client: TestClient, session: dict[str, Any], status: int = 422) -> str:
    end = time.monotonic() + 60
    while (response := client.get(f"/v1/explore/{session['session']}")).status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    return str(check_problem(response, status)["detail"])


@pytest.fixture(scope="module")
def opened(client: TestClient) -> dict[str, Any]:
    return until_ready(client, client.post("/v1/explore", json=TWELVE).json())


def test_cells_are_laid_out_with_what_the_model_and_others_say(opened: dict[str, Any]) -> None:
    view = opened["view"]
    assert (opened["cells"], view["projection"], view["fitted"]) == (12, "principal components", 12)
    assert array(view["positions"]).shape == (12, 2)
    types = [view["types"][code] for code in array(view["type"])]
    assert types == ["B cell", *["B cell", "CD8-positive, alpha-beta T cell"] * 5, "B cell"]
    assert array(view["probability"])[1:3] == pytest.approx([1.0, 0.6])
    assert (array(view["novelty_p"]) == 0.5).all()
    side, age = view["labels"]
    assert [side["values"][code] for code in array(side["codes"])] == ["left", "right"] * 6
    assert array(age["numbers"]).tolist() == list(range(12))
    assert opened["provenance"]["snapshot_name"] == "tiny"


def test_the_same_cells_as_npz_lie_at_the_same_places(client: TestClient, opened: dict[str, Any]) -> None:
    counts = scipy.sparse.csr_matrix([[cell.get("G0", 0), cell.get("G1", 0)] for cell in TWELVE["counts"]["RNA"]])
    arrays: dict[str, Any] = {
        REQUEST: b"{}",
        "RNA/indptr": counts.indptr,
        "RNA/indices": counts.indices,
        "RNA/data": counts.data,
        "RNA/features": np.array([b"G0", b"G1"]),
    }
    reply = client.post("/v1/explore", content=write_npz(arrays), headers={"Content-Type": NPZ})
    view = until_ready(client, reply.json())["view"]
    assert array(view["positions"]).tolist() == array(opened["view"]["positions"]).tolist()


def test_selected_cells_are_told_together_and_one_by_one(client: TestClient, opened: dict[str, Any]) -> None:
    asked = {"cells": [4, 1, 3, 3], "options": {"top": 2, "min_probability": 0.7}}
    reply = client.post(f"/v1/explore/{opened['session']}/annotate", json=asked).json()
    assert reply["cells"] == 3
    assert [(one["cell_type"], one["cells"]) for one in reply["called"]] == [("B cell", 2), ("unknown", 1)]
    assert [round(one["probability"], 3) for one in reply["types"]] == [0.7, 0.2]  # means of 1, 1, .1 and 0, 0, .6
    assert [(one["cell"], one["cell_type"]) for one in reply["each"]] == [(1, "B cell"), (3, "B cell"), (4, "unknown")]
    assert (reply["covering"], reply["novelty_p"]) == ("lymphocyte", 0.5)
    everything = client.post(f"/v1/explore/{opened['session']}/annotate", json={}).json()
    assert everything["cells"] == 12


def test_the_shift_of_selected_cells_is_that_of_a_perturb_request(client: TestClient, opened: dict[str, Any]) -> None:
    rows = [2, 4, 6]
    asked = {"cells": rows, "perturbations": ["G1", ["G2", "G1"]], "top": 3}
    reply = client.post(f"/v1/explore/{opened['session']}/perturb", json=asked).json()
    chosen = {"RNA": [TWELVE["counts"]["RNA"][row] for row in rows]}
    whole = {"counts": chosen, "perturbations": asked["perturbations"], "options": {"vectors": True}}
    expected = client.post("/v1/perturb", json=whole).json()
    for shift, effect in zip(reply["shifts"], expected["perturbations"], strict=True):
        assert shift["perturbation"] == effect["perturbation"]
        assert array(shift["effects"]["RNA"]["delta"]).tolist() == effect["effects"]["RNA"]["delta"]
        assert shift["effects"]["RNA"]["up"] == []
        (down,) = shift["effects"]["RNA"]["down"]
        assert (down["feature_name"], down["control"], down["delta"]) == ("G1", 4, -4)
    assert (reply["cells"], reply["averaged"]) == (3, 3)


def test_a_large_selection_is_averaged_over_some_of_it(replica: Replica) -> None:
    with TestClient(make_app(replica, Limits(), offer=Offer(explore=Explore(perturbed_cells=5)))) as client:
        session = until_ready(client, client.post("/v1/explore", json=TWELVE).json())["session"]
        replies = [client.post(f"/v1/explore/{session}/perturb", json={"perturbations": ["G1"]}).json() for _ in "ab"]
        assert (replies[0]["cells"], replies[0]["averaged"]) == (12, 5)
        assert replies[0] == replies[1]


def test_a_gene_colours_cells_by_what_was_measured(client: TestClient, opened: dict[str, Any]) -> None:
    where = f"/v1/explore/{opened['session']}"
    reply = client.get(f"{where}/expression", params={"feature": "G1"}).json()
    expected = [np.log1p(1e4 * i / (2 * i + 1)) if i % 2 == 0 else 0.0 for i in range(12)]
    assert array(reply["values"]) == pytest.approx(expected, rel=1e-5)
    assert (reply["feature_id"], reply["unit"]) == ("ENSG00000000001", "log1p of counts per 10,000")
    found = client.get(f"{where}/features", params={"like": "g"}).json()["features"]
    assert [(one["feature_name"], one["cells"]) for one in found] == [("G0", 12), ("G1", 5)]
    report = check_problem(client.get(f"{where}/expression", params={"feature": "G77"}), 422)
    assert report["errors"][0]["field"] == "feature"
    check_problem(client.get(f"{where}/expression", params={"feature": "G0", "measurement": "ATAC"}), 422)


def test_a_symbol_of_two_organisms_is_the_gene_that_the_cells_have(client: TestClient) -> None:
    """The model knows TWIN of the human first, and of the mouse."""
    for organism, gene in (("homo_sapiens", "ENSG00000000099"), ("mus_musculus", "ENSMUSG00000000099")):
        body = {"counts": {"RNA": [{"TWIN": 1}, {"G0": 1}, {"TWIN": 2}]}, "prompts": {"organism": organism}}
        where = f"/v1/explore/{until_ready(client, client.post('/v1/explore', json=body).json())['session']}"
        (offered,) = client.get(f"{where}/features", params={"like": "twin"}).json()["features"]
        told = client.get(f"{where}/expression", params={"feature": "TWIN"}).json()
        assert (offered["feature_id"], told["feature_id"]) == (gene, gene)
        assert np.count_nonzero(array(told["values"])) == offered["cells"] == 2


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("annotate", {"cells": [12]}, "cells.0"),
        ("annotate", {"cells": [0, -1]}, "cells.1"),
        ("annotate", {"cells": [10**30]}, "cells"),
        ("annotate", {"cells": []}, "cells"),
        ("perturb", {"perturbations": ["G7"]}, "perturbations.0"),
        ("perturb", {"perturbations": ["G1"] * 65}, "perturbations"),
    ],
)
def test_what_cannot_be_asked_is_named(
    client: TestClient, opened: dict[str, Any], path: str, body: dict[str, Any], field: str
) -> None:
    report = check_problem(client.post(f"/v1/explore/{opened['session']}/{path}", json=body), 422)
    assert report["errors"][0]["field"] == field


def test_labels_must_fit_the_cells(client: TestClient) -> None:
    report = check_problem(client.post("/v1/explore", json=TWELVE | {"labels": {"side": ["left"]}}), 422)
    assert report["errors"][0]["field"] == "labels.side"


def test_labels_of_more_words_than_have_codes_are_refused() -> None:
    def asked(n_words: int) -> ExploreRequest:
        names = [f"cell{number}" for number in range(n_words)]
        return ExploreRequest.model_validate({"counts": {"RNA": [{}] * n_words}, "labels": {"name": names}})

    label = _label("name", _frame(asked(2**15))["name"])
    assert label.codes is not None
    assert np.unique(array(label.codes.model_dump())).tolist() == list(range(2**15))
    with pytest.raises(FieldRefused, match=r"labels\.name: 32,769 different words; at most 32,768"):
        _frame(asked(2**15 + 1))


# ------------------------------------------------------------------ cells of files and snapshots
def test_offered_cells_are_asked_for_by_name_and_never_by_path(client: TestClient, cells: Path) -> None:
    assert client.get("/v1/datasets").json()["datasets"] == [{"name": "six", "form": "h5ad"}]
    session = until_ready(client, client.post("/v1/explore/dataset", json={"dataset": "six"}).json())
    assert session["notes"][0] == "counts are those of X"
    labels = {label["name"]: label for label in session["view"]["labels"]}
    assert list(labels) == ["side", "depth", "remark"]
    assert session["view"]["coverage"]["RNA"]["unmapped"] == ["unheard-of"]
    values = client.get(f"/v1/explore/{session['session']}/expression", params={"feature": "G2"}).json()["values"]
    totals = np.arange(60).reshape(6, 10) + 1
    expected = np.log1p(1e4 * totals[:, 2] / totals[:, :9].sum(axis=1))  # what the model knows of the counts
    assert array(values) == pytest.approx(expected, rel=1e-5)
    for strange in (str(cells), "../cells", "six/", ""):
        check_problem(client.post("/v1/explore/dataset", json={"dataset": strange}), 404)


def test_a_selection_keeps_to_the_options_of_annotate(cells: Path) -> None:
    class Forgetful(FakePredictor):
        def novelty(self, cells: Any) -> np.ndarray:
            return np.full(len(cells.tissue), np.nan, np.float32)

    app = make_app(replica_of(Forgetful()), Limits(body_bytes=200_000), offer=Offer({"six": str(cells)}))
    with TestClient(app) as client:
        session = until_ready(client, client.post("/v1/explore/dataset", json={"dataset": "six"}).json())
        share = session["view"]["coverage"]["RNA"]["share_of_counts"]
        route = f"/v1/explore/{session['session']}/annotate"
        for options, warnings in (({}, 0), ({"min_coverage": share}, 0), ({"min_novelty_p": 0.01}, 1)):
            reply = client.post(route, json={"options": options}).json()
            assert len(reply["warnings"]) == warnings
        problem = client.post(route, json={"options": {"min_coverage": share + 0.01}})
        check_problem(problem, 422)
        assert "counts.RNA" in problem.text
        assert "unheard-of" in problem.text


def test_an_h5ad_file_is_a_body(client: TestClient, cells: Path) -> None:
    sent = {"content": cells.read_bytes(), "headers": {"Content-Type": "application/x-hdf5"}}
    session = until_ready(client, client.post("/v1/explore/h5ad", **sent).json())
    one = client.post(f"/v1/explore/{session['session']}/annotate", json={"cells": [3]}).json()["each"][0]
    assert one["name"] == "3"
    check_problem(client.post("/v1/explore/h5ad", content=b"x", headers={"Content-Type": "text/csv"}), 415)
    check_problem(client.post("/v1/explore/h5ad", **(sent | {"content": b"x" * 300_000})), 413)
    assert "no HDF5" in refusal(client, client.post("/v1/explore/h5ad", **(sent | {"content": b"x"})).json())


def read(path: Path, **limits: int) -> Any:
    return sources._read_h5ad(str(path), "the file", Limits(**{"cells": 100, "nonzeros": 10_000} | limits))


def test_an_honest_file_is_read(tmp_path: Path) -> None:
    assert read(honest(tmp_path / "honest.h5ad"))["RNA/indptr"].shape == (41,)


@pytest.mark.parametrize(
    "change",
    [change for change in CORRUPTIONS if change.__name__ not in READ_FROM_VALUES],
    ids=lambda one: one.__name__,
)
def test_a_file_that_reaches_out_or_lies_is_refused(tmp_path: Path, change: Callable[[h5py.File, Path], None]) -> None:
    with pytest.raises(InputRefused, match=f"^the file: .*({CORRUPTIONS[change]})"):
        read(corrupt(tmp_path, change))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"cells": 39}, "40 cells; 1 to 39"),
        ({"nonzeros": 50}, r"360 counts; send at most 100, [\d,]+ and 50"),
        ({"features": 29}, r"30 features, .* send at most 100, 29 and"),
    ],
)
def test_sizes_are_refused_before_anything_is_read(tmp_path: Path, limits: dict[str, int], message: str) -> None:
    with pytest.raises(InputRefused, match=f"the file: .*{message}"):
        read(honest(tmp_path / "honest.h5ad"), **limits)


def test_scaled_values_are_no_counts(tmp_path: Path) -> None:
    adata = anndata.AnnData(np.full((5, 3), 0.5, np.float32))
    adata.write_h5ad(tmp_path / "scaled.h5ad")
    with pytest.raises(InputRefused, match="no raw counts"):
        read(tmp_path / "scaled.h5ad")
    adata.layers["counts"] = np.full((5, 3), 2, np.float32)
    adata.write_h5ad(tmp_path / "scaled.h5ad")
    assert read(tmp_path / "scaled.h5ad")["RNA/data"].tolist() == [2] * 15


@pytest.mark.parametrize("published", [False, True])
def test_a_file_has_the_same_counts_whichever_way_it_comes(tmp_path: Path, published: bool) -> None:
    adata, path = anndata.AnnData(np.full((2, 3), 4, np.float32)), tmp_path / "cells.h5ad"
    adata.raw = anndata.AnnData(np.full((2, 3), 3, np.float32), var=adata.var)
    adata.layers["counts"], adata.layers["raw_counts"] = np.full((2, 3), 1.0), np.full((2, 3), 2.0)
    places = {"layers/counts": 1, "layers/raw_counts": 2, "raw/X": 3, "X": 4}
    if published:
        adata.uns["schema_version"] = "5.0.0"
        places = {name: places[name] for name in ("raw/X", "X")}
    adata.write_h5ad(path)
    for place, value in places.items():
        form = httpx.Request("POST", "http://x", files={"file": path.read_bytes()})
        _, posted, chosen = h5ad.read(form.headers["content-type"], form.read(), Limits())
        opened = read(path)
        assert posted["RNA/data"].tolist() == opened["RNA/data"].tolist() == [value] * 6
        assert (chosen, json.loads(opened["said"])["notes"]) == (place, [f"counts are those of {place}"])
        with h5py.File(path, "r+") as file:
            file[place][0, 0] = 0.5
    with pytest.raises(InputRefused, match=r"no raw counts .* in .*raw/X, X;"):
        read(path)


def test_cells_without_counts_of_their_own_are_refused(tmp_path: Path) -> None:
    path = honest(tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        fewer = file["obs/_index"][:39]
        attributes = dict(file["obs/_index"].attrs)
        del file["obs/_index"]
        file["obs/_index"] = fewer
        file["obs/_index"].attrs.update(attributes)
    with pytest.raises(InputRefused, match="the file: X has 40 rows and obs 39"):
        read(path)


def test_a_reader_that_dies_or_sleeps_harms_only_its_own_file(cells: Path) -> None:
    with pytest.raises(InputRefused, match="needs more than 40 MB"):
        read_h5ad_cells(cells.read_bytes(), Explore(memory_mb=40), Limits())
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        read_h5ad_cells(cells.read_bytes(), Explore(read_s=0.01), Limits())


@pytest.mark.parametrize("error", [OSError("cannot load shared object"), ImportError("x"), SystemError("x")])
def test_a_library_that_finds_no_memory_to_be_loaded_in_is_no_damaged_file(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *words: Any) -> None:
            if name == "h5py":
                raise error

    monkeypatch.delitem(sys.modules, "h5py")
    monkeypatch.setattr(sys, "meta_path", [Full(), *sys.meta_path])
    with pytest.raises(MemoryError):
        sources._read_h5ad("x.h5ad", "x", Limits())


def test_the_ingress_loads_no_umap() -> None:
    asked = "import sys, serve.app; sys.exit(bool({'umap', 'pynndescent'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT, check=False).returncode == 0


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("lakes") / "small")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 60, {"RNA": 12})
    create_snapshot(uri, "blood", SnapshotSettings(seed=3))
    return uri


def test_a_snapshot_gives_its_cells_or_some_of_them(lake: str) -> None:
    whole = read_snapshot_cells(lake, "blood", Explore(), Limits())
    cell_number = whole.obs["cell"].astype(str).str.removeprefix("first-").astype(int).to_numpy()
    assert sorted(cell_number) == list(range(60))
    part = whole.counts["RNA"]
    counts_CG = scipy.sparse.csr_matrix((part.data, part.indices, part.indptr), shape=(60, len(part.features)))
    order = [int(feature[-4:]) for feature in part.features]
    assert (counts_CG.toarray() == encoded_counts(0, 60, 12).toarray()[cell_number][:, order]).all()
    assert set(whole.obs["cell_type"]) == {"even", "odd"}
    some = read_snapshot_cells(lake, "blood", Explore(cells=30), Limits())
    assert 20 <= len(some.obs) <= 30
    assert "of 60 cells, drawn at random" in some.notes[0]


def test_where_a_lake_lies_is_not_said_to_those_who_ask(lake: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(MissingError, match=r"blood: no lake here; make one with: .* --lake blood$"):
        read_snapshot_cells(str(gone), "blood", Explore(), Limits())
    with pytest.raises(MissingError) as refused:
        read_snapshot_cells(lake, "lung", Explore(), Limits())
    assert "lung: no snapshot 'lung' (snapshots here: blood)" in str(refused.value)
    assert lake not in str(refused.value)


def test_names_of_cells_that_are_not_there_are_refused_before_anything_starts(lake: str, cells: Path) -> None:
    check_sources({"six": str(cells)}, {"blood": lake})
    with pytest.raises(MissingError, match=r"cells\.six"):
        check_sources({"six": str(cells) + "x"}, {})
    with pytest.raises(MissingError, match=r"snapshots\.lung"):
        check_sources({}, {"lung": lake})


# ------------------------------------------------------------------ what is kept, and how long
def test_sets_of_cells_are_let_go_when_idle_or_when_others_need_the_room(replica: Replica) -> None:
    def opened_by(explore: Explore) -> list[int]:
        with TestClient(make_app(replica, Limits(), offer=Offer(explore=explore))) as client:
            sessions = [until_ready(client, client.post("/v1/explore", json=TWELVE).json()) for _ in range(3)]
            time.sleep(1.1)
            return [client.get(f"/v1/explore/{session['session']}").status_code for session in [*sessions, *sessions]]

    assert opened_by(Explore()) == [200] * 6
    assert opened_by(Explore(sessions=2)) == [404, 200, 200] * 2
    assert opened_by(Explore(sessions=1)) == [404, 404, 200] * 2
    assert opened_by(Explore(idle_s=1))[2] == 404


def test_a_set_that_is_gone_says_what_to_do(client: TestClient) -> None:
    session = until_ready(client, client.post("/v1/explore", json=TWELVE).json())["session"]
    assert client.delete(f"/v1/explore/{session}").status_code == 204
    report = check_problem(client.get(f"/v1/explore/{session}"), 404)
    assert "open them again" in report["detail"]
    assert client.delete("/v1/explore/nothing").status_code == 204


def test_too_many_at_a_time_are_asked_to_wait_and_unready_ones_answer_nothing() -> None:
    slow = replica_of(FakePredictor(delay_s=0.5))
    with TestClient(make_app(slow, Limits(), offer=Offer(explore=Explore(preparing=1)))) as client:
        first = client.post("/v1/explore", json=TWELVE).json()
        check_problem(client.post("/v1/explore", json=TWELVE), 429)
        check_problem(client.post(f"/v1/explore/{first['session']}/annotate", json={}), 409)
        assert client.delete(f"/v1/explore/{first['session']}").status_code == 204
    slow.close()


def test_another_checkpoint_does_not_answer_for_cells_that_it_has_not_read(replica: Replica) -> None:
    class Swapped:
        def __init__(self) -> None:
            self.changed = False

        def __getattr__(self, name: str) -> Any:
            return getattr(replica, name)

        async def ask(self, *words: Any) -> Any:
            if self.changed:
                raise StaleModel("changed")
            return await replica.ask(*words)

    model = Swapped()
    with TestClient(make_app(model, Limits())) as client:
        session = until_ready(client, client.post("/v1/explore", json=TWELVE).json())["session"]
        model.changed = True
        report = check_problem(client.post(f"/v1/explore/{session}/perturb", json={"perturbations": ["G1"]}), 409)
        assert "open them again" in report["detail"]


def test_perturbations_are_not_looked_up_in_another_checkpoint_than_the_cells_were_read_for(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that answers now does not know the perturbation, and the one before would still answer."""
    monkeypatch.setattr("serve.desk.FRESH_S", -1.0)
    with TestClient(make_app(replica, Limits())) as client:
        session = until_ready(client, client.post("/v1/explore", json=TWELVE).json())["session"]
        described = asyncio.run(replica.describe())
        manifest = described.manifest | {"model_sha256": "c" * 64}
        prompts = dict(described.prompts) | {"perturbation": [""]}

        async def described_anew() -> Any:
            return dataclasses.replace(described, manifest=manifest, prompts=prompts)

        async def ready() -> str:
            return "c" * 64

        monkeypatch.setattr(replica, "describe", described_anew)
        monkeypatch.setattr(replica, "ready", ready)
        report = check_problem(client.post(f"/v1/explore/{session}/perturb", json={"perturbations": ["G1"]}), 409)
        assert "open them again" in report["detail"]


# ------------------------------------------------------------------ where cells lie
def test_principal_components_are_those_of_hand_and_of_any_number_of_cells() -> None:
    line_CD = np.array([[0, 0, 3], [2, 0, 3], [4, 0, 3]], np.float32)
    assert principal(line_CD, 2).tolist() == [[-2, 0], [0, 0], [2, 0]]
    assert principal(line_CD[:1], 2).tolist() == [[0, 0]]


def two_kinds(n_cells: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.normal(size=(n_cells, 8)) + 12 * (np.arange(n_cells) % 2)[:, None]).astype(np.float32)


def test_two_kinds_lie_apart_fitted_or_not_and_health_answers_meanwhile(replica: Replica) -> None:
    counts = [{"G0": 500.0 if i % 2 else 1.0, f"G{i % 7 + 1}": float(i % 13)} for i in range(90)]
    with TestClient(make_app(replica, Limits(), offer=Offer(explore=Explore(fitted_cells=60)))) as client:
        session = client.post("/v1/explore", json={"counts": {"RNA": counts}}).json()
        slowest = 0.0
        while session["state"] != "ready":
            begin = time.monotonic()
            assert client.get("/v1/health/ready").status_code == 200
            slowest = max(slowest, time.monotonic() - begin)
            session = client.get(f"/v1/explore/{session['session']}").json()
            time.sleep(0.05)
    assert slowest < 2
    assert (session["view"]["projection"], session["view"]["fitted"]) == ("umap", 60)
    positions_C2 = array(session["view"]["positions"])
    centres = [positions_C2[kind::2].mean(axis=0) for kind in (0, 1)]
    nearest = np.array([[np.linalg.norm(cell - centre) for centre in centres] for cell in positions_C2]).argmin(axis=1)
    assert (nearest == np.arange(90) % 2).mean() > 0.95


def test_the_same_embeddings_lie_at_the_same_places() -> None:
    embedding_CD = two_kinds(12)
    assert (project(embedding_CD, fitted=20) == project(embedding_CD, fitted=20)).all()


def test_cells_are_not_unpacked_while_too_many_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replica_of(FakePredictor(delay_s=0.5))
    read: list[int] = []
    monkeypatch.setattr("serve.app.read_request", lambda *_: read.append(1))
    arrays: dict[str, Any] = {REQUEST: b"{}", "RNA/indptr": np.array([0, 0])}
    with TestClient(make_app(slow, Limits(), offer=Offer(explore=Explore(preparing=1)))) as client:
        first = client.post("/v1/explore", json=TWELVE).json()
        check_problem(client.post("/v1/explore", content=write_npz(arrays), headers={"Content-Type": NPZ}), 429)
        assert client.delete(f"/v1/explore/{first['session']}").status_code == 204
    assert not read
    slow.close()


def test_requests_that_are_unpacked_count_among_those_that_are_prepared() -> None:
    sessions = Sessions(None, Explore(preparing=2))  # type: ignore[arg-type]
    with sessions.permit(), sessions.permit(), pytest.raises(Overloaded), sessions.permit():
        pass
    with sessions.permit():
        pass
    sessions.close()


def test_cells_of_a_snapshot_are_asked_about_with_what_was_measured_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "mixed")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "genes", 20, {"RNA": 12})
        add_dataset(writer, "both", 20, {"RNA": 12, "protein": 4})
    create_snapshot(uri, "mixed", SnapshotSettings(seed=3))
    whole = read_snapshot_cells(uri, "mixed", Explore(), Limits())
    has_C = np.array([name.startswith("both") for name in whole.obs["cell"].astype(str)])
    assert (whole.measured["protein"] == has_C).all()
    assert whole.measured["RNA"].all()

    class Seeing(FakePredictor):
        """Embeds a cell as what it is given of it: RNA counts, protein counts (-1: it was not measured)."""

        def __init__(self) -> None:
            super().__init__()
            genes, proteins = ([f"{kind}{i:04d}" for i in range(n)] for kind, n in (("RNA", 12), ("protein", 4)))
            self.vocabulary["RNA"] = FakeVocabulary(genes, genes, ["homo_sapiens"] * 12)
            self.vocabulary["protein"] = FakeVocabulary(proteins, proteins, ["homo_sapiens"] * 4)

        def embed(self, cells: Any) -> np.ndarray:
            found = super().embed(cells)
            found[:, 1] = found[:, 1] if "protein" in cells.counts else -1
            return found

    laid: list[np.ndarray] = []
    monkeypatch.setattr("serve.sessions.FEWEST", 1_000)
    monkeypatch.setattr("serve.sessions.principal", lambda cells, n: laid.append(cells) or principal(cells, n))
    model = replica_of(Seeing())
    with TestClient(make_app(model, Limits(), offer=Offer(snapshots={"mixed": uri}))) as client:
        session = until_ready(client, client.post("/v1/explore/dataset", json={"dataset": "mixed"}).json())
        told = [note for note in session["notes"] if "protein" in note]
        assert told == ["20 cells were not measured for protein"]
        (embedding_CD,) = laid
        assert ((embedding_CD[:, 1] >= 0) == has_C).all()
        counts = {name: scipy.sparse.csr_matrix((p.data, p.indices, p.indptr)) for name, p in whole.counts.items()}
        assert (embedding_CD[:, 0] == np.asarray(counts["RNA"].sum(axis=1)).ravel()).all()
        asked = {"perturbations": ["G1"], "top": 1}
        wanted = {"feature": "protein0000", "measurement": "protein"}
        shown = client.get(f"/v1/explore/{session['session']}/expression", params=wanted).json()
        assert (np.isfinite(array(shown["values"])) == has_C).all()
        reply = client.post(f"/v1/explore/{session['session']}/perturb", json=asked).json()
        effects = reply["shifts"][0]["effects"]
        order = {name: [part.features.index(f"{name}{i:04d}") for i in range(4)] for name, part in whole.counts.items()}
        for name, rows in (("RNA", slice(None)), ("protein", has_C)):
            expected = counts[name].toarray()[rows][:, order[name]].mean(axis=0)
            assert array(effects[name]["control"])[:4] == pytest.approx(expected, rel=1e-5)
    model.close()


def test_a_file_of_genes_and_proteins_is_split_as_in_every_other_request(tmp_path: Path) -> None:
    adata = anndata.AnnData(scipy.sparse.csr_matrix(np.arange(1, 13, dtype=np.float32).reshape(3, 4)))
    adata.var_names = ["G0", "G1", "CD4", "CD8"]
    ids = [f"ENSG{i:011d}" for i in range(2)]
    adata.var["gene_ids"] = [*ids, "CD4", "CD8"]
    adata.var["feature_types"] = ["Gene Expression"] * 2 + ["Antibody Capture"] * 2
    adata.write_h5ad(tmp_path / "cite.h5ad")
    content = (tmp_path / "cite.h5ad").read_bytes()
    found = read_h5ad_cells(content, Explore(), Limits()).counts
    assert {name: part.features for name, part in found.items()} == {"RNA": ids, "protein": ["CD4", "CD8"]}
    assert [found[name].data.tolist() for name in found] == [[1, 2, 5, 6, 9, 10], [3, 4, 7, 8, 11, 12]]
    boundary = "b"
    form = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + content + b"\r\n--b--\r\n"
    sent = read_request(translate(f"{FORM}; boundary={boundary}", form, Limits()).npz, EmbedRequest, Limits()).counts
    for name, part in found.items():
        assert part.features == sent[name].features
        assert part.data.tolist() == sent[name].data.tolist()


def test_a_set_that_was_let_go_counts_until_its_thread_has_ended() -> None:
    started, go_on = threading.Event(), threading.Event()

    def read() -> Read:
        started.set()
        go_on.wait(30)
        return Read({}, pd.DataFrame(), [])

    async def ask() -> None:
        sessions = Sessions(Desk(replica_of(FakePredictor()), Limits()), Explore(preparing=1))
        session = sessions.begin("mine", read)
        await asyncio.to_thread(started.wait, 30)
        sessions.drop(session.id)
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match="1 sets of cells are being prepared"):
            sessions.begin("another", read)
        go_on.set()
        assert session.task is not None
        await asyncio.wait([session.task], timeout=30)
        sessions.drop(sessions.begin("another", read).id)
        sessions.close()

    asyncio.run(ask())


def test_shifts_of_more_values_than_a_reply_may_hold_are_refused(replica: Replica) -> None:
    with TestClient(make_app(replica, Limits(values=30))) as client:
        session = until_ready(client, client.post("/v1/explore", json=TWELVE).json())["session"]
        url = f"/v1/explore/{session}/perturb"
        assert client.post(url, json={"perturbations": ["G1"]}).status_code == 200
        report = check_problem(client.post(url, json={"perturbations": ["G1", "G2"] * 8}), 422)
        assert "can be asked about at a time" in report["detail"]
