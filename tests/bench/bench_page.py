"""How smooth the page's map is, and how long cells take to be laid out.

usage: make bench-page BENCH='--cells 100000 --fitted 20000'. A headless Chromium draws by software, which is the
slowest that a user can have: a graphics card takes a small part of it. Each frame moves or zooms the map, and is
waited for until its pixels are there. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import json
import threading
import time
from typing import Any

import numpy as np
import uvicorn
from browser import Tab, browser
from fastapi import FastAPI

from serve.page import add_page
from serve.projection import project

FRAMES = """
new Promise((done) => {
  const { map } = window.somaflow;
  const took = [], apart = [];
  let last = null;
  const pixel = new Uint8Array(4);
  const frame = (now) => {
    if (last !== null) apart.push(now - last);
    last = now;
    if (took.length === COUNT) return done({ took, apart, part: map.part / map.n });
    const begin = performance.now();
    const i = took.length;
    map.asked = true; // drawn here, not once more after this
    MOVE;
    map.draw();
    map.gl.readPixels(0, 0, 1, 1, map.gl.RGBA, map.gl.UNSIGNED_BYTE, pixel);
    took.push(performance.now() - begin);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
})
"""
STILL = """
(() => {
  const { map } = window.somaflow;
  const pixel = new Uint8Array(4);
  map.moving = false;
  return Array.from({ length: 11 }, () => {
    const begin = performance.now();
    map.draw();
    map.gl.readPixels(0, 0, 1, 1, map.gl.RGBA, map.gl.UNSIGNED_BYTE, pixel);
    return performance.now() - begin;
  });
})()
"""
MOVES = {
    "pan": "map.moveBy(6 * Math.cos(i / 9), 6 * Math.sin(i / 9))",
    "zoom": "map.zoomBy(i % 60 < 30 ? 1.06 : 1 / 1.06)",
}


def embeddings(n_cells: int, n_types: int = 20, size: int = 64) -> np.ndarray:
    """Return cells of some types, each spread over a few directions of its own, as embeddings are."""
    random = np.random.default_rng(0)
    centre = random.normal(size=(n_types, size)) * 3
    direction = random.normal(size=(n_types, 3, size))
    kind = random.integers(n_types, size=n_cells)
    along = random.uniform(-1, 1, size=(n_cells, 3))
    noise = random.normal(size=(n_cells, size)) * 0.02
    return (centre[kind] + np.einsum("ck,ckd->cd", along, direction[kind]) + noise).astype(np.float32)


def measure_frames(tab: Tab, positions_C2: np.ndarray, count: int) -> dict[str, Any]:
    """Return milliseconds of frames, by what moves and whether half of the cells are selected."""
    text = base64.b64encode(positions_C2.astype("<f4").tobytes()).decode()
    tab.run(
        "(() => { document.querySelector('#empty').hidden = true;"
        f"const bytes = Uint8Array.from(atob('{text}'), (one) => one.charCodeAt(0));"
        "window.somaflow.map.show(new Float32Array(bytes.buffer)); })()"
    )
    found: dict[str, Any] = {}
    for selected in (False, True):
        cells = f"Array.from({{ length: {len(positions_C2) // 2} }}, (_, i) => 2 * i)" if selected else "[]"
        tab.run(f"window.somaflow.map.choose({cells})")
        for name, move in MOVES.items():
            told = tab.run(FRAMES.replace("COUNT", str(count)).replace("MOVE", move))
            found[f"{name}{', half selected' if selected else ''}"] = summary(told["took"], told["apart"]) | {
                "share_drawn": round(told["part"], 3)
            }
    tab.run("window.somaflow.map.reset()")
    found["all_drawn_ms"] = round(float(np.median(tab.run(STILL))), 1)
    lasso = "[[100, 100], [700, 100], [760, 400], [400, 560], [100, 480]]"
    began = "(() => { const t = performance.now(); const n = window.somaflow.map.inside(LASSO).length;"
    found["lasso"] = tab.run(began.replace("LASSO", lasso) + "return { cells: n, ms: performance.now() - t }; })()")
    click = (
        "(() => { const t = performance.now(); for (let i = 0; i < 100; i++) window.somaflow.map.nearest(4 * i, 300);"
    )
    found["nearest_ms"] = tab.run(click + "return (performance.now() - t) / 100; })()")
    return found


def summary(took: list[float], apart: list[float]) -> dict[str, float]:
    """Return percentiles of what frames take and of the time between them."""
    words = {"frame_ms": took[5:], "between_ms": apart[5:]}
    return {
        f"{name}_{which}": round(float(np.percentile(values, which)), 2)
        for name, values in words.items()
        for which in (50, 95, 99)
    }


def measure_projection(embedding_CD: np.ndarray, fitted: int) -> dict[str, float]:
    """Return seconds to lay cells out, and which share of each cell's 10 neighbours stay among its nearest 30."""
    from sklearn.neighbors import NearestNeighbors

    begin = time.perf_counter()
    positions_C2 = project(embedding_CD, fitted=fitted)
    took = time.perf_counter() - begin
    some = np.random.default_rng(1).choice(len(embedding_CD), min(1_000, len(embedding_CD)), replace=False)
    before = NearestNeighbors(n_neighbors=11).fit(embedding_CD).kneighbors(embedding_CD[some], return_distance=False)
    after = NearestNeighbors(n_neighbors=31).fit(positions_C2).kneighbors(positions_C2[some], return_distance=False)
    kept = [len(set(a[1:]) & set(b[1:])) / 10 for a, b in zip(before, after, strict=True)]
    return {"seconds": round(took, 1), "neighbours_kept": round(float(np.mean(kept)), 3)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--fitted", type=int, nargs="*", default=[20_000], help="sizes of the sample to fit UMAP to")
    options = parser.parse_args()
    embedding_CD = embeddings(options.cells)
    project(embedding_CD[:100], fitted=50)  # compiled before it is timed
    laid = {str(fitted): measure_projection(embedding_CD, fitted) for fitted in options.fitted}
    positions_C2 = embedding_CD[:, :2]
    app = FastAPI()
    add_page(app)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        with browser() as tab:
            tab.size(1280, 800)
            tab.go(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/")
            tab.wait("window.somaflow")
            drawn = tab.run("(() => { const gl = window.somaflow.map.gl; return gl.getParameter(gl.VERSION); })()")
            frames = measure_frames(tab, positions_C2, options.frames)
    finally:
        server.should_exit = True
        thread.join(20)
    print(json.dumps({"cells": options.cells, "drawn_by": drawn, "frames": frames, "umap_by_fitted": laid}))


if __name__ == "__main__":
    main()
