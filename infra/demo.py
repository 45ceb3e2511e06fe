"""This module is the demo: the whole road on one machine, by the commands that a user would type.

It starts the project's own command lines, shows what they print, asks the served model over HTTP, draws the cells and
ends with the list of commands, so that each can be repeated alone. It imports none of the project's packages.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import httpx
import matplotlib as mpl
import mudata
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
console = Console(highlight=False)
PYTHON = os.path.relpath(sys.executable, ROOT) if Path(sys.executable).is_relative_to(ROOT) else sys.executable
CELLS_PER_REQUEST = 256
PLAIN = {"none": "#e3e3e3", "control": "#bdbdbd"}
"""Labels of cells to which nothing was done: drawn first, below the others, in grey."""

INGEST = """\
# Three sources of different kinds: simulated cells with knock-outs (RNA, proteins, chromatin), an unperturbed time
# course as a 10x folder (RNA, antibodies), and 700 real blood cells as an h5ad of log1p values, restored to counts.
lake = {lake}

[[source]]
uri = "simulated:"
dataset_id = "knock-outs"
truth = {truth}
simulation.cells = {cells}

[[source]]
uri = {source}
dataset_id = "time-course"
organism = "synthetic_construct"

[[source]]
uri = {real}
dataset_id = "pbmc68k"
layer = "raw"
values = "log1p"
title = "700 blood cells, cut from 68k PBMC (Zheng et al. 2017)"
obs.tissue = "=blood"
"""

TRAIN = """\
# A small model: 2 workers on 2 cores, about a minute.
lake = {lake}
snapshot = "demo"
output = {output}
name = "demo"
steps = {steps}
workers = 2
optim.lr = 3e-3
"""


class Road:
    """The steps, and what was run so far."""

    def __init__(self, folder: Path, lake: Path, *, small: bool) -> None:
        self.folder = folder
        self.lake = _short(lake)
        self.small = small
        self.commands: list[str] = []
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def run(self, title: str, *words: str) -> None:
        """Run one command of ours; its output goes where ours goes; a failure ends the demo with its status."""
        console.rule(f"[bold]{title}")
        command = [PYTHON, "-m", *words]
        self._note(command)
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=False)
        if done.returncode:
            console.print(f"[red]stopped:[/] the command above ended with status {done.returncode}")
            sys.exit(done.returncode)

    def _note(self, command: list[str]) -> None:
        line = shlex.join(command)
        if line not in self.commands:
            self.commands.append(line)
        console.print(f"[dim]$ {line}[/]", soft_wrap=True)

    def path(self, *parts: str) -> str:
        """Return a path below the demo's folder, short when it lies in the checkout."""
        return _short(self.folder.joinpath(*parts))

    def write(self, name: str, text: str) -> str:
        """Write a file below the demo's folder; return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.path(name)

    # ------------------------------------------------------------------ the steps
    def ingest(self) -> None:
        """Bring three sources of different kinds into the lake; the second run shows that nothing comes twice."""
        n_cells = 600 if self.small else 2400
        time_course = 300 if self.small else 900
        self.run(
            "1  make a time course as a 10x folder and an h5mu file",
            *("ingest", "simulate", self.path("source"), "--cells", str(time_course)),
            *("--seed", "7", "--set", "perturbed=0"),
        )
        job = self.write(
            "ingest.toml",
            INGEST.format(
                lake=_quoted(self.lake),
                cells=n_cells,
                source=_quoted(self.path("source", "10x")),
                real=_quoted(_real_cells()),
                truth=_quoted(self.path("truth")),
            ),
        )
        self.run("2  ingest three sources of different kinds", "ingest", "run", job)
        self.run("3  the same again adds nothing", "ingest", "run", job)
        self.run("4  prove the lake", "store", "validate", "--lake", self.lake)
        self.run("5  what is in it", "store", "info", "--lake", self.lake)

    def train(self) -> None:
        """Shuffle the lake into a snapshot and train on it."""
        if not Path(ROOT, self.lake, "snapshots", "demo", "snapshot.json").exists():
            words = ("snapshot", "create", "demo", "--lake", self.lake, "--set", "seed=1")
            self.run("6  shuffle the lake into a snapshot", "store", *words)
        steps = 60 if self.small else 400
        filled = TRAIN.format(lake=_quoted(self.lake), output=_quoted(self.path("runs")), steps=steps)
        recipe = self.write("train.toml", filled)
        self.run("7  train on two workers", "train", recipe)

    def serve(self) -> dict[str, Any]:
        """Serve the checkpoint, ask it, and stop it."""
        cells, blood = self.path("cells.h5mu"), self.path("blood.h5ad")
        self.run(
            "8  take cells out of the lake to ask about",
            *("store", "export", cells, "--organism", "synthetic_construct", "--lake", self.lake),
            *("--measurement", "RNA", "--measurement", "protein"),
        )
        self.run("   and the real ones", "store", "export", blood, "--lake", self.lake)
        console.print()
        console.rule("[bold]9  serve the checkpoint and ask it over HTTP")
        words = ["serve", "run", self.path("runs", "demo", "checkpoint"), "--port", str(self.port)]
        self._note([PYTHON, "-m", *words])
        server = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, start_new_session=True)
        try:
            with mudata.set_options(pull_on_update=False):
                return self._ask(server, mudata.read_h5mu(cells), anndata.read_h5ad(blood))
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()

    def _ask(self, server: subprocess.Popen[bytes], cells: mudata.MuData, blood: anndata.AnnData) -> dict[str, Any]:
        self._wait(server)
        rna = cells["rna"]
        modalities = {"RNA": rna, "protein": cells["prot"]}
        control = list(rna.obs_names[rna.obs["perturbation"].isin(["", "control"])][:128])
        targets = [name for name in self._get("/v1/perturbations")["perturbations"] if name in set(_targets(rna))]
        options = {"vectors": True, "top": 3}
        body = {"counts": _counts(modalities, control), "perturbations": targets, "options": options}
        first = self.write("embed.json", json.dumps({"counts": _counts(modalities, control[:2])}))
        asked = self.write("perturb.json", json.dumps(body))
        for path, file in (("embed", first), ("perturb", asked)):
            self._note(
                ["curl", "-s", f"{self.url}/v1/{path}", "-H", "Content-Type: application/json", "-d", f"@{file}"]
            )
        return {
            "simulated": (self._embed(modalities), rna.obs),
            "blood": (self._embed({"RNA": blood}), blood.obs),
            "perturb": self._post("/v1/perturb", body),
        }

    def _embed(self, modalities: dict[str, anndata.AnnData]) -> NDArray[np.float32]:
        names = list(modalities["RNA"].obs_names)
        parts = []
        for start in range(0, len(names), CELLS_PER_REQUEST):
            body = {"counts": _counts(modalities, names[start : start + CELLS_PER_REQUEST])}
            reply = self._post("/v1/embed", body | {"options": {"encoding": "base64"}})
            parts.append(_decoded(reply["embeddings"]))
        return np.concatenate(parts)

    def _wait(self, server: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if server.poll() is not None:
                sys.exit(f"the server ended with status {server.returncode} before it answered")
            try:
                if httpx.get(f"{self.url}/v1/health/ready", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        sys.exit("the server was not ready within 120 s")

    def _get(self, path: str) -> dict[str, Any]:
        return dict(httpx.get(self.url + path, timeout=60).raise_for_status().json())

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return dict(httpx.post(self.url + path, json=body, timeout=120).raise_for_status().json())

    def report(self, answers: dict[str, Any], seconds: float) -> None:
        """Draw the cells, print what was found and the commands that were run."""
        picture = self.folder / "cells.png"
        panels = [("simulated", "cell_type"), ("simulated", "perturbation"), ("blood", "cell_type")]
        _draw({name: answers[name] for name in ("simulated", "blood")}, panels, picture)
        table = Table(title="what the served model says of each knock-out, beside the simulator's truth")
        for column in ("knock-out", "genes it moves most", "r with the truth", "size of effect"):
            table.add_column(column)
        for row in _effects(answers["perturb"], json.loads((self.folder / "truth/truth.json").read_text())):
            table.add_row(*row)
        console.print(table)
        provenance = answers["perturb"]["provenance"]
        console.print(f"answered by model {provenance['model_sha256'][:12]} after {provenance['global_step']} steps")
        console.print(f"picture of the cells: [bold]{self.path('cells.png')}[/]")
        console.rule("[bold]the same, one by one")
        for command in self.commands:
            console.print(command, soft_wrap=True, markup=False)
        console.print(f"\n[green]the whole road took {seconds:.0f} s[/]")


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _quoted(path: str) -> str:
    """Write a path as TOML does, whatever is in it."""
    return json.dumps(path, ensure_ascii=False)


def _targets(rna: anndata.AnnData) -> list[str]:
    return [name for name in rna.obs["perturbation"].unique() if name not in ("", "control")]


def _counts(modalities: dict[str, anndata.AnnData], names: list[str]) -> dict[str, Any]:
    """Write cells as the API's CSR matrices."""
    counts = {}
    for measurement, modality in modalities.items():
        part = modality[names]
        counts[measurement] = {
            "features": list(part.var_names),
            "indptr": part.X.indptr.tolist(),
            "indices": part.X.indices.tolist(),
            "data": part.X.data.astype(float).tolist(),
        }
    return counts


def _decoded(tensor: dict[str, Any]) -> NDArray[np.float32]:
    values = np.frombuffer(base64.b64decode(tensor["base64"]), dtype=tensor["dtype"])
    return values.reshape(tensor["shape"])


def _effects(reply: dict[str, Any], truth: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Compare predicted changes of genes with the log fold changes that the simulator applied."""
    order = {name: number for number, name in enumerate(reply["features"]["RNA"])}
    shared = [number for number, name in enumerate(truth["genes"]) if name in order]
    columns = [order[truth["genes"][number]] for number in shared]
    rows = []
    for effect in reply["perturbations"]:
        rna = effect["effects"]["RNA"]
        predicted = np.array(rna["delta"])[columns]
        applied = np.array(truth["log_fold_change"][effect["perturbation"]])[shared]
        top = ", ".join(f"{item['feature_id']} {item['delta']:+.2f}" for item in rna["top"][:3])
        null = not np.any(applied)
        r = "no effect applied" if null else f"{np.corrcoef(predicted, applied)[0, 1]:.2f}"
        rows.append((effect["perturbation"], top, r, f"{np.sqrt(np.mean(predicted**2)):.3f}"))
    return rows


def _draw(groups: dict[str, tuple[NDArray[np.float32], Any]], panels: list[tuple[str, str]], path: Path) -> None:
    """Draw the cells' embeddings in two dimensions, each panel coloured by one column of obs."""
    from umap import UMAP

    places = {
        name: UMAP(n_neighbors=20, min_dist=0.3, random_state=0, n_jobs=1).fit_transform(embedding)
        for name, (embedding, _) in groups.items()
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5.6), layout="constrained")
    for axis, (name, column) in zip(axes, panels, strict=True):
        obs = groups[name][1]
        labels = obs[column].astype(str).replace("", "none").to_numpy()
        known = sorted(set(labels) - PLAIN.keys())
        colours = plt.get_cmap("tab10" if len(known) <= 10 else "tab20")
        shades = {label: colour for label, colour in PLAIN.items() if label in labels}
        for label, colour in (shades | {label: colours(number) for number, label in enumerate(known)}).items():
            mine = labels == label
            axis.scatter(*places[name][mine].T, s=5, color=colour, label=f"{label} ({mine.sum()})", linewidths=0)
        axis.set_title(f"{len(obs):,} {name} cells by {column.replace('_', ' ')}")
        axis.set(xticks=[], yticks=[], xlabel="UMAP 1 of the served embeddings", ylabel="UMAP 2")
        axis.legend(markerscale=3, fontsize=8, frameon=False, loc="best")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _free_port() -> int:
    """Return 8000, or another port where that is taken."""
    for port in (8000, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    sys.exit("no port of this machine is free")


def _real_cells() -> str:
    """Return the h5ad of 700 blood cells that comes inside scanpy."""
    found = importlib.util.find_spec("scanpy")
    if found is None or found.origin is None:
        sys.exit("scanpy is not installed; run: make setup")
    return str(Path(found.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="The whole road on one machine.")
    parser.add_argument("--small", action="store_true", help="fewer cells and steps, for a check")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where everything but the lake goes")
    parser.add_argument("--lake", type=Path, default=ROOT / "lake", help="the lake, made when it is missing")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    begin = time.monotonic()
    road = Road(options.folder.resolve(), options.lake.resolve(), small=options.small)
    road.ingest()
    road.train()
    answers = road.serve()
    road.report(answers, time.monotonic() - begin)


if __name__ == "__main__":
    main()
