"""Checkpoints in the hub's manner: saved, fetched and checked, with a card that says what they were made of."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import encoded
import numpy as np
import pytest
import torch
from encoded import add_dataset
from huggingface_hub import ModelCard
from scipy.sparse import csr_matrix
from small_checkpoint import write_checkpoint

from store.errors import ConflictError, InputRefused, MissingError, StorageError, UsageError
from store.schema import DatasetPlan
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot
from store.writer import LakeWriter
from train.adapter import AdapterSettings, adapted, adapter_weights, attached, save_adapter
from train.card import card_of, describe
from train.checkpoint import EXPORTED, MANIFEST
from train.loop import Run
from train.predictor import Predictor
from train.pretrained import from_pretrained, save_pretrained
from train.settings import RunSettings

ROOT = Path(__file__).parent.parent
DISCOVER = "Publication: https://doi.org/10.1/x curated and distributed by CZ CELLxGENE Discover in Collection: y"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("saved") / "checkpoint")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, sizes = Predictor.load(checkpoint), AdapterSettings(rank=2, alpha=4)
    model = adapted(base.model, sizes)
    with torch.no_grad():
        for number, weight in enumerate(adapter_weights(model).values()):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return save_adapter(tmp_path_factory.mktemp("adapters") / "moved", model, sizes, base.manifest)


def answers(predictor: Predictor) -> dict[str, np.ndarray]:
    counts = {
        name: csr_matrix((np.arange(4)[:, None] + np.arange(len(part.feature_id))) % 5, dtype=np.float32)
        for name, part in predictor.vocabulary.items()
    }
    cells = predictor.cells(counts, {"tissue": ["blood", "lung", "", "blood"]})
    effects = predictor.perturb(cells, ["G1"])
    return {"": predictor.embed(cells)} | {name: effect.delta_G for name, effect in effects.items()}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray], rtol: float = 0) -> bool:
    return all(np.allclose(first[name], second[name], rtol=rtol, atol=rtol / 10) for name in first)


# ------------------------------------------------------------------------------------------------------------ a hub


class Hub(ThreadingHTTPServer):
    """What ``snapshot_download`` asks of a hub: which commit a revision is, its files, their digests and bytes."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.repositories = repositories
        self.gated = gated
        self.fetched: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def reply(self, path: str) -> tuple[int, dict[str, str], bytes]:
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        found = found or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        name, verb, revision = found[1], found[2], found[3]
        commit, folder = self.commit(name), self.repositories[name]
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if revision not in ("main", "v1", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if verb == "revision":
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": []}).encode()
        if verb == "tree":
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            return 200, {}, json.dumps([entry(path, folder) for path in files]).encode()
        content = (folder / found[4]).read_bytes()
        self.fetched.append(found[4])
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}, content


def entry(path: Path, folder: Path) -> dict[str, Any]:
    content = path.read_bytes()
    name = str(path.relative_to(folder))
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class Answering(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        status, headers, body = self.server.reply(unquote(urlsplit(self.path).path))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *said: Any) -> None:
        """Say nothing."""


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)


@pytest.fixture
def hub(checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    online = tmp_path / "online"
    shutil.copytree(checkpoint, online)
    (online / "notes").mkdir()
    (online / "notes/README.md").write_text("not of the checkpoint")
    (online / "optimizer.bin").write_bytes(b"\0" * 100)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with running(Hub({"lab/cells": online, "lab/moved": adapter, "lab/kept": online}, gated=("lab/kept",))) as one:
        monkeypatch.setenv("HF_ENDPOINT", one.endpoint)
        yield one


# --------------------------------------------------------------------------------------------------------- folders
def test_what_is_saved_answers_bit_for_bit_and_keeps_where_it_comes_from(checkpoint: Path, tmp_path: Path) -> None:
    first = from_pretrained(checkpoint)
    folder = save_pretrained(first, tmp_path / "again")
    second = from_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {*EXPORTED, MANIFEST}
    assert same(answers(first), answers(second))
    assert (second.vocabulary, second.prompts, second.tokens) == (first.vocabulary, first.prompts, first.tokens)
    assert second.manifest["snapshot"] == first.manifest["snapshot"]
    assert second.manifest["model_sha256"] == first.manifest["model_sha256"]
    assert second.manifest["trained"]["created"] == first.manifest["created"]
    third = from_pretrained(save_pretrained(second, folder))  # over itself
    assert third.manifest["trained"] == second.manifest["trained"]
    assert same(answers(third), answers(first))


def test_an_adapter_is_named_at_loading_and_merged_at_saving(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    base, moved = from_pretrained(checkpoint), from_pretrained(checkpoint, adapter=adapter)
    assert not same(answers(base), answers(moved), rtol=1e-3)
    plain = from_pretrained(save_pretrained(moved, tmp_path / "merged"))
    assert attached(plain.model) == []
    assert same(answers(plain), answers(moved), rtol=1e-4)
    manifest = json.loads((adapter / MANIFEST).read_text())
    assert plain.manifest["merged"] == {
        "base_sha256": base.manifest["model_sha256"],
        "adapter_sha256": manifest["adapter_sha256"],
    }
    assert base.manifest["model_sha256"] in (tmp_path / "merged/README.md").read_text()


def test_nothing_but_a_checkpoint_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    for taken in ("home", "home/thesis.tex"):
        with pytest.raises(ConflictError, match="holds something that is no checkpoint; choose another folder"):
            save_pretrained(from_pretrained(checkpoint), tmp_path / taken)
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("where", "words", "error", "says"),
    [
        ("s3://bucket/checkpoint", {}, UsageError, "copy what is elsewhere to a folder first"),
        ("somewhere", {"revision": "v1"}, UsageError, "revision='v1' is for a hub"),
        ("lab/cells", {}, MissingError, "a checkpoint on a hub is written hf://lab/cells"),
        ("nowhere", {}, MissingError, "no checkpoint here"),
        ("hf://cells", {}, UsageError, "write hf://owner/name, or hf://owner/name@revision"),
        ("hf://lab/cells@v1", {"revision": "v2"}, UsageError, "revision='v2' says another; name one"),
        ("hf://lab/a--b", {}, UsageError, "no name of a repository"),
    ],
)
def test_places_that_cannot_be_are_refused_with_a_remedy(
    where: str, words: dict[str, str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        from_pretrained(where, **words)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- the hub
@pytest.mark.parametrize("where", ["hf://lab/cells", "hf://lab/cells@v1"])
def test_a_checkpoint_comes_from_a_hub_with_its_own_files_only(
    checkpoint: Path, hub: Hub, tmp_path: Path, where: str
) -> None:
    found = from_pretrained(where, cache=tmp_path / "cache")
    assert same(answers(found), answers(from_pretrained(checkpoint)))
    assert set(hub.fetched) == {*EXPORTED, MANIFEST}
    hub.fetched.clear()
    from_pretrained(where, revision=hub.commit("lab/cells") if "@" not in where else "v1", cache=tmp_path / "cache")
    assert hub.fetched == []
    assert list((tmp_path / "cache").glob("models--lab--cells/snapshots/*/manifest.json"))
    assert not list((tmp_path / "cache").glob("models--lab--cells/tmp*"))


def test_an_adapter_comes_from_a_hub(checkpoint: Path, adapter: Path, hub: Hub, tmp_path: Path) -> None:
    found = from_pretrained("hf://lab/cells", adapter="hf://lab/moved", cache=tmp_path / "cache")
    assert same(answers(found), answers(from_pretrained(checkpoint, adapter=adapter)))


def test_bytes_that_a_hub_changed_are_refused(hub: Hub, tmp_path: Path) -> None:
    words = hub.repositories["lab/cells"] / "vocabulary.json"
    words.write_bytes(words.read_bytes().replace(b"G1", b"G9"))
    with pytest.raises(InputRefused, match=r"hf://lab/cells@[0-9a-f]{40}/vocabulary.json: its SHA-256 differs"):
        from_pretrained("hf://lab/cells", cache=tmp_path / "cache")
    (hub.repositories["lab/cells"] / MANIFEST).unlink()
    with pytest.raises(MissingError, match=r"hf://lab/cells@[0-9a-f]{40}: no checkpoint here"):
        from_pretrained("hf://lab/cells", cache=tmp_path / "other")


@pytest.mark.parametrize(
    ("where", "error", "says"),
    [
        ("hf://lab/nothing", MissingError, "hf://lab/nothing: no such repository, or it is private; look at its name"),
        ("hf://lab/cells@v9", MissingError, "hf://lab/cells@v9: the repository has no such branch, tag or commit"),
        ("hf://lab/kept", StorageError, "hf://lab/kept: its owner lets in whom they know; ask on its page"),
    ],
)
def test_what_a_hub_has_not_is_said_with_a_remedy(
    hub: Hub, tmp_path: Path, where: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        from_pretrained(where, cache=tmp_path / "cache")


def test_without_a_network_the_cache_serves_what_it_holds(
    checkpoint: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_pretrained("hf://lab/cells", cache=tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    found = from_pretrained("hf://lab/cells", cache=tmp_path / "cache")
    assert same(answers(found), answers(from_pretrained(checkpoint)))
    with pytest.raises(StorageError, match="look at the network, HF_ENDPOINT and HF_HUB_OFFLINE") as caught:
        from_pretrained("hf://lab/cells", cache=tmp_path / "empty")
    assert not isinstance(caught.value, MissingError)


def test_offline_nothing_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    from_pretrained("hf://lab/cells", cache=tmp_path / "cache")
    hub.fetched.clear()
    code = "import sys; from pathlib import Path; from train.pretrained import from_pretrained\n"
    code += (
        "for cache in sys.argv[1:]: print(from_pretrained('hf://lab/cells', cache=Path(cache)).manifest['global_step'])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache"), str(tmp_path / "empty")],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout == "3\n"
    assert "StorageError: hf://lab/cells: not all files are in the cache" in told.stderr
    assert hub.fetched == []


# --------------------------------------------------------------------------------------------------------- the card
@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    said = {"citation": DISCOVER, "dataset_title": "Blood | of many", "collection_name": "Atlas", "source_kind": "h5ad"}
    with pytest.MonkeyPatch.context() as patched, LakeWriter(uri) as writer:
        patched.setattr(encoded, "DatasetPlan", partial(DatasetPlan, info=said))
        add_dataset(writer, "first", 150, {"RNA": 40, "protein": 6})
        patched.setattr(encoded, "DatasetPlan", partial(DatasetPlan, info={"citation": "Doe 2020"}))
        add_dataset(writer, "second", 90, {"RNA": 60}, "mus_musculus")
    create_snapshot(uri, "both", SnapshotSettings(seed=2))
    create_snapshot(uri, "first", SnapshotSettings(seed=2, where="dataset_id == 'first'"))
    create_snapshot(uri, "second", SnapshotSettings(seed=2, where="dataset_id == 'second'"))
    return uri


@pytest.fixture(scope="module")
def trained(lake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "lake": lake,
        "snapshot": "both",
        "output": str(tmp_path_factory.mktemp("runs")),
        "name": "of: blood",
        "steps": 6,
        "workers": 1,
        "model": {"width": 16, "layers": 1, "heads": 2},
        "data": {"global_batch": 24, "block": 64, "window": 2, "tokens": 32},
        "optim": {"warmup_steps": 2, "lr": 0.003},
    }
    return Path(Run(parse_settings(RunSettings, values, where="test"), 1).train().checkpoint)


def test_the_card_says_data_counts_figures_and_limits_as_the_lake_and_the_run_do(lake: str, trained: Path) -> None:
    card, manifest = (trained / "README.md").read_text(), json.loads((trained / MANIFEST).read_text())
    snapshot = open_snapshot(lake, "both")
    assert f"id `{snapshot.id}`" in card
    assert f"TileDB timestamp {snapshot.lake_timestamp})" in card
    assert f"| first | 150 | Blood \\| of many | Atlas | {DISCOVER} | h5ad | cc-by-4.0 |" in card
    assert "| second | 90 |  |  | Doe 2020 |  | not known |" in card
    cells = snapshot.cells(["organism", "split"]).to_pandas()
    for organism, all_of in (("homo_sapiens", 150), ("mus_musculus", 90)):
        learned = int(((cells["organism"] == organism) & (cells["split"] == "train")).sum())
        assert 0 < learned < all_of
        assert f"| {organism} | {all_of} | {learned} |" in card
    assert "| blood | 240 |" in card
    assert f"after training | {manifest['figures']['loss_test']:.4f} |" in card
    for title in ("## Data", "## Figures", "## Intended use and limits", "## How to load it"):
        assert f"\n{title}\n" in card


def test_the_front_matter_is_what_a_hub_reads(trained: Path) -> None:
    told = ModelCard((trained / "README.md").read_text()).data
    manifest = json.loads((trained / MANIFEST).read_text())
    assert (told.library_name, told.license) == ("somaflow", "other")
    assert {"single-cell", "homo_sapiens", "mus_musculus", "RNA", "protein"} <= set(told.tags)
    assert told.model_name == "of: blood"
    (figure,) = told.eval_results
    assert (figure.dataset_name, figure.dataset_split, figure.metric_type) == ("both", "test", "nll")
    assert figure.metric_value == manifest["figures"]["loss_test"]


@pytest.mark.parametrize(("name", "licence"), [("both", "other"), ("first", "cc-by-4.0"), ("second", "unknown")])
def test_the_licence_is_the_datas_where_all_of_it_shares_one(lake: str, name: str, licence: str) -> None:
    snapshot = open_snapshot(lake, name)
    data = json.loads(json.dumps(describe(snapshot, "train")))
    assert ModelCard(card_of({"data": data, "measurements": ["RNA"]})).data.license == licence


def test_a_card_can_be_written_without_the_lake_and_lists_the_largest_of_many_values(lake: str) -> None:
    snapshot = open_snapshot(lake, "both")
    labels = snapshot.label_values()
    labels["tissue"] = {f"t{number:02}": {"train": number, "test": 1} for number in range(1, 16)}
    snapshot.lake_uri = "/nowhere"
    card = card_of({"data": describe(snapshot, "train")})
    assert "| first | 150 |  |  |  |  | not known |" in card
    assert "| t15 | 16 | 15 |" in card
    assert "| t03 |" not in card
    assert "| 3 more | 9 | 6 |" in card


def test_what_was_not_measured_is_no_figure(trained: Path) -> None:
    manifest = json.loads((trained / MANIFEST).read_text())
    manifest["figures"] |= {"loss_test": None, "loss_test_first": float("nan")}
    card = card_of(manifest)
    assert ModelCard(card).data.eval_results is None
    assert "after training | not measured |" in card
    assert "before training | not measured |" in card


def test_the_cards_example_runs(trained: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    n_genes = len(Predictor.load(trained).vocabulary["RNA"].feature_id)
    known: dict[str, Any] = {"counts": csr_matrix(np.eye(3, n_genes, dtype=np.float32))}
    exec(block.replace("path/to/checkpoint", str(trained)), known)
    assert known["embeddings"].shape == (3, 16)


def test_a_checkpoint_saved_again_keeps_the_card_that_its_manifest_tells(
    trained: Path, lake: str, tmp_path: Path
) -> None:
    predictor = from_pretrained(trained)
    predictor.manifest.setdefault("data", describe(open_snapshot(lake, "both"), "train"))
    folder = save_pretrained(predictor, tmp_path / "again")
    assert (folder / "README.md").read_text() == (trained / "README.md").read_text()
