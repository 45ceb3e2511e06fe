"""The page at ``/`` in a real browser: open cells, select some, see what they are, perturb them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest
import uvicorn
from browser import CHROMIUM, Tab, browser
from small_checkpoint import GENES, write_checkpoint
from starlette.testclient import TestClient

from serve.access import Purse, read_tokens
from serve.app import make_app
from serve.explore import Offer
from serve.page import HEADERS
from serve.replica import Replica
from serve.settings import Limits, ServeSettings

TOKEN = "person-" + "z" * 30
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("page") / "checkpoint")
    replica = Replica(ServeSettings(checkpoint=str(checkpoint)))
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def purses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Purse]:
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    path.write_text(f'[person]\ntoken = "{TOKEN}"\n')
    return read_tokens(str(path))


def cells_of_two_kinds(path: Path, n_cells: int = 12) -> Path:
    """Fewer cells than UMAP needs, in two kinds, one of them named so that it would be markup."""
    counts = np.ones((n_cells, len(GENES)), np.float32)
    counts[::2, :20] = 30
    adata = anndata.AnnData(counts)
    adata.var_names, adata.obs_names = GENES, [f"cell-{i}" for i in range(n_cells)]
    adata.obs["kind"] = ["<b>one</b>", "two"] * (n_cells // 2)
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def url(replica: Replica, purses: dict[str, Purse], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cells = cells_of_two_kinds(tmp_path_factory.mktemp("cells") / "cells.h5ad")
    app = make_app(replica, Limits(), purses, offer=Offer({"twelve": str(cells)}))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def tab(url: str) -> Iterator[Tab]:
    with browser() as tab:
        tab.size(1280, 800)
        tab.go(url + "/")
        yield tab


def test_the_page_is_open_and_may_run_only_its_own_scripts(replica: Replica, purses: dict[str, Purse]) -> None:
    with TestClient(make_app(replica, Limits(), purses)) as client:
        home = client.get("/")
        assert home.status_code == 200
        assert home.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
        assert "unsafe" not in HEADERS["Content-Security-Policy"]
        for place in ("main.js", "scatter.js", "charts.js", "colours.js", "api.js", "page.css", "icon.svg"):
            found = client.get(f"/page/{place}")
            assert found.status_code == 200, place
            assert "://" not in found.text.replace("http://www.w3.org/", ""), f"{place} names another server"
        assert client.get("/page/main.js", headers={"If-None-Match": found.headers["ETag"]}).status_code == 200
        assert client.get("/page/icon.svg", headers={"If-None-Match": found.headers["ETag"]}).status_code == 304
        for strange in ("/page/__init__.py", "/page/..%2Faccess.py", "/page/%2e%2e/v1/models", "/v1/datasets"):
            assert client.get(strange).status_code in (401, 404), strange


@needs_browser
@pytest.mark.browser
def test_a_person_opens_cells_selects_some_and_perturbs_them(tab: Tab) -> None:
    tab.wait("!document.querySelector('#tokenForm').hidden")  # the server asks for a token
    tab.click("#token")
    tab.type(TOKEN)
    tab.key("Enter")
    tab.wait("document.querySelector('#served').textContent.startsWith('model small-')")
    assert "protein (5)" in tab.run("document.querySelector('#card').textContent")

    tab.choose("#dataset", "twelve")
    tab.wait("!document.querySelector('#legend').hidden && window.somaflow.state.view")
    assert tab.run("[...document.querySelector('#colour').options].map((one) => one.textContent)") == [
        "annotation (model)",
        "its probability",
        "kind",
        "a gene",
    ]
    tab.choose("#colour", "label 0")
    assert "<b>one</b> 6" in tab.run("document.querySelector('#legend').textContent")  # a text, not markup

    tab.click("#legend button")
    tab.wait("document.querySelector('#annotation .bars')")
    assert "6 of 12" in tab.run("document.querySelector('#count').textContent")
    assert "covering type" in tab.run("document.querySelector('#annotation').textContent")

    tab.click("#target")
    tab.type("G1")
    tab.key("Enter")
    tab.type("G2")
    tab.key("Enter")
    tab.click("#predict")
    tab.wait("document.querySelector('#shift svg.plot')")
    assert "G1+G2" in tab.run("document.querySelector('#shift .verdict').textContent")
    assert tab.run("document.querySelectorAll('#shift svg.plot').length") >= 2


@needs_browser
@pytest.mark.browser
def test_the_map_is_clicked_drawn_around_and_moved_by_keys(tab: Tab) -> None:
    tab.run("document.querySelector('#map').scrollIntoView()")
    x, y = tab.run(
        "(() => { const { map } = window.somaflow; const box = map.canvas.getBoundingClientRect();"
        "const at = map.screen(map.positions[6], map.positions[7]); return [box.x + at[0], box.y + at[1]]; })()"
    )
    tab.mouse("mousePressed", x, y)
    tab.mouse("mouseReleased", x, y)
    (clicked,) = tab.wait("window.somaflow.state.selected.length === 1 && window.somaflow.state.selected")
    tab.wait("document.querySelector('#annotation .bars')")
    assert f"cell-{clicked}" in tab.run("document.querySelector('#annotation').textContent")

    tab.click("#lasso")
    left, top, right, bottom = tab.run(
        "(() => { const b = document.querySelector('#map').getBoundingClientRect();"
        "return [b.left + 2, b.top + 2, b.right - 2, b.bottom - 2]; })()"
    )
    tab.mouse("mousePressed", left, bottom)
    for corner in ((left, top + 60), (right, top + 60), (right, bottom)):
        tab.mouse("mouseMoved", *corner)
    tab.mouse("mouseReleased", right, bottom)
    tab.wait("window.somaflow.state.selected.length === 12")
    tab.click("#lasso")

    tab.run("document.querySelector('#map').focus()")
    tab.key("Escape")
    tab.wait("window.somaflow.state.selected.length === 0")
    before = tab.run("window.somaflow.map.zoom")
    tab.key("+")
    assert tab.run("window.somaflow.map.zoom") > before
    tab.key("a")
    assert tab.run("window.somaflow.state.selected") == []  # both kinds lie at the map's edges, out of sight now
    tab.key("0")
    tab.key("a")
    tab.wait("window.somaflow.state.selected.length === 12")


@needs_browser
@pytest.mark.browser
def test_a_dropped_file_is_sent_and_a_wrong_one_is_explained(tab: Tab, tmp_path: Path) -> None:
    root = tab.call("DOM.getDocument")["root"]["nodeId"]
    field = tab.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    tab.call("DOM.setFileInputFiles", nodeId=field, files=[str(cells_of_two_kinds(tmp_path / "mine.h5ad", 8))])
    tab.wait("window.somaflow.state.view && window.somaflow.state.view.n === 8")
    (tmp_path / "no.h5ad").write_text("no cells")
    tab.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "no.h5ad")])
    tab.wait("!document.querySelector('#alert').hidden")
    assert "is no HDF5 file" in tab.run("document.querySelector('#alert').textContent")
    assert tab.run("document.querySelector('#alert').getAttribute('role')") == "alert"


@pytest.fixture
def strange(tab: Tab, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Cells with odd labels, opened in the page; yields labels to what the list of colours calls them."""
    counts = np.ones((8, len(GENES)), np.float32)
    counts[::2, :20] = 30
    adata = anndata.AnnData(counts)
    adata.var_names, adata.obs_names = GENES, [f"cell-{i}" for i in range(8)]
    adata.obs["endless"] = [0.0, 1.0, 2.0, 4.0, np.inf, -np.inf, np.nan, 4.0]
    adata.obs["beyond"] = [np.inf, -np.inf] * 4
    adata.obs["long"] = ["a word " * 57, "short"] * 4
    adata.write_h5ad(tmp_path / "strange.h5ad")
    root = tab.call("DOM.getDocument")["root"]["nodeId"]
    field = tab.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    tab.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "strange.h5ad")])
    tab.wait(f"document.querySelector('#about').textContent.startsWith('strange.h5ad: 8 cells') && {SHOWN}")
    yield dict(tab.run("[...document.querySelectorAll('#colour option')].map((one) => [one.textContent, one.value])"))
    tab.run("document.querySelector('#alert').click()")


SHOWN = "window.somaflow.state.view && document.querySelector('#busy').hidden"
LEGEND = "document.querySelector('#legend').textContent"
ALERT = "(document.querySelector('#alert').hidden ? '' : document.querySelector('#alert').textContent)"


@needs_browser
@pytest.mark.browser
def test_numbers_without_end_or_without_any_are_coloured_and_told(tab: Tab, strange: dict[str, str]) -> None:
    tab.choose("#colour", strange["endless"])
    assert tab.run(LEGEND) == "endless: 04"  # from the least to the largest that has an end
    tab.choose("#colour", strange["beyond"])
    assert tab.run(LEGEND) == "beyond: no cell has a finite number"
    tab.choose("#colour", "gene")
    assert tab.run(LEGEND) == "type a gene"
    tab.click("#gene")
    tab.type("G3")
    tab.key("Enter")
    tab.wait(f"{LEGEND}.startsWith('G3, ')")
    tab.run("document.querySelector('#gene').value = ''")
    tab.click("#gene")
    tab.type("NONE")
    tab.key("Enter")
    tab.wait(f"{ALERT}.startsWith('The model does not know the gene NONE; choose')")
    assert tab.run(LEGEND) == "type a gene"


@needs_browser
@pytest.mark.browser
def test_the_narrowest_phone_shows_all_with_long_labels_too(tab: Tab, strange: dict[str, str]) -> None:
    tab.size(320, 640, mobile=True)
    tab.choose("#colour", strange["long"])
    tab.run("document.querySelector('#map').focus()")
    tab.key("a")
    tab.wait("document.querySelector('#annotation .bars')")
    assert tab.run("document.documentElement.scrollWidth") <= 320
    assert tab.run(
        "[...document.querySelectorAll('#legend button, #legend button span, main input')]"
        ".every((one) => one.getBoundingClientRect().right <= 320)"
    )
    tab.size(1280, 800)


@needs_browser
@pytest.mark.browser
def test_a_name_with_blanks_and_commas_is_one_target_and_several_may_be_typed_at_once(tab: Tab) -> None:
    names = ["hydroxyzine, dihydrochloride", "TGFB1 10ng/ml"]
    tab.run(f"{names}.forEach((name) => window.somaflow.state.known.add(name))")
    for typed, targets in (
        (names[0], [names[0]]),
        (f"{names[1]} + G1", [names[1], "G1"]),
        ("G1, G2", ["G1", "G2"]),
        ("G2 G1", ["G2", "G1"]),
    ):
        tab.run("window.somaflow.state.targets = []; document.querySelector('#target').value = ''")
        tab.click("#target")
        tab.type(typed)
        tab.key("Enter")
        assert tab.run("window.somaflow.state.targets") == targets
    tab.type("G1, G9")
    tab.key("Enter")
    assert tab.run(ALERT) == "The model has not seen the target G1, G9; choose one of the list."
    tab.run("document.querySelector('#target').value = ''; document.querySelector('#alert').click()")


@needs_browser
@pytest.mark.browser
def test_a_bound_that_is_no_share_is_refused_and_the_one_before_stays(tab: Tab, strange: dict[str, str]) -> None:
    for typed in ("5", "-1", ""):
        tab.run(f"document.querySelector('#leastProbability').value = '{typed}'")
        tab.run("document.querySelector('#leastProbability').dispatchEvent(new Event('change', {bubbles: true}))")
        assert "takes a number from 0 to 1; it stays at 0.3" in tab.run(ALERT)
        assert tab.run("document.querySelector('#leastProbability').value") == "0.3"


@needs_browser
@pytest.mark.browser
def test_cells_that_the_server_let_go_are_opened_again_from_the_message_or_from_the_list(tab: Tab) -> None:
    for again in ("button", "list"):
        tab.choose("#dataset", "twelve")
        tab.wait(f"{SHOWN} && window.somaflow.state.view.n === 12")
        gone = tab.run("window.somaflow.state.session")
        # the page has its token for itself, so its own module asks
        tab.run(f"import('/page/api.js').then(({{ ask }}) => ask('DELETE', '/v1/explore/{gone}'))")
        tab.run("document.querySelector('#map').focus()")
        tab.key("a")
        tab.wait(f"{ALERT}.includes('open them again')")
        assert tab.run("document.querySelector('#dataset').value") == ""
        if again == "button":
            tab.click("#alert button")
            tab.wait(f"{SHOWN} && window.somaflow.state.session !== '{gone}'")
            assert tab.run(ALERT) == ""


@needs_browser
@pytest.mark.browser
def test_who_chooses_faster_than_cells_are_prepared_gets_the_last_that_was_chosen(tab: Tab) -> None:
    def refused() -> bool:
        told = [event["params"] for event in tab.events if event.get("method") == "Network.responseReceived"]
        return any(
            one["response"]["status"] == 429 and one["response"]["url"].endswith("/v1/explore/dataset") for one in told
        )

    # all in one script: how many the server reads at once is then what refuses one, not how fast this test asks
    faster = "for (let asked = 0; asked < 8; asked++) { const list = document.querySelector('#dataset');"
    faster += "list.value = 'twelve'; list.dispatchEvent(new Event('change', {bubbles: true})); }"
    for _ in range(8):  # and a server that is done with one before the next arrives is asked again
        tab.run(faster)
        tab.wait(f"{SHOWN} && window.somaflow.state.view.n === 12")
        assert tab.run(ALERT) == ""
        if refused():
            break
    assert refused()
    assert tab.run(ALERT) == ""


@needs_browser
@pytest.mark.browser
def test_a_token_that_is_none_or_not_known_is_told_apart_from_none_given(tab: Tab) -> None:
    for typed, told in (
        ("tok→en", "This is no token: it holds a character that no token has"),
        ("w" * 30, "The server does not know this token"),
    ):
        tab.run("document.querySelector('#tokenForm').hidden = false; document.querySelector('#token').value = ''")
        tab.click("#token")
        tab.type(typed)
        tab.key("Enter")
        tab.wait(f"{ALERT}.startsWith('{told}')")
    tab.run("document.querySelector('#token').value = ''")
    tab.click("#token")
    tab.type(TOKEN)
    tab.key("Enter")
    tab.wait("document.querySelector('#tokenForm').hidden")
    assert tab.run(ALERT) == ""


@needs_browser
@pytest.mark.browser
def test_every_field_has_a_name_and_nothing_is_wider_than_a_phone(tab: Tab) -> None:
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    asked = {"button", "combobox", "textbox", "spinbutton", "application", "checkbox"}
    fields = [one for one in nodes if one.get("role", {}).get("value") in asked and not one.get("ignored")]
    assert len(fields) >= 8
    assert [one["role"]["value"] for one in fields if not one.get("name", {}).get("value")] == []
    tab.size(390, 844, mobile=True)
    assert tab.run("document.documentElement.scrollWidth") <= 390


@needs_browser
@pytest.mark.browser
def test_who_comes_back_to_the_page_finds_the_cells_and_may_ask_about_them(tab: Tab, url: str) -> None:
    tab.choose("#dataset", "twelve")
    tab.wait("window.somaflow.state.view && window.somaflow.state.view.n === 12")
    tab.run("addEventListener('pageshow', (event) => { window.kept = event.persisted; })")
    session = tab.run("window.somaflow.state.session")
    tab.go(url + "/v1/health/live")
    history = tab.call("Page.getNavigationHistory")
    tab.call("Page.navigateToHistoryEntry", entryId=history["entries"][history["currentIndex"] - 1]["id"])
    tab.wait("window.kept")
    assert tab.run("window.somaflow.state.session") == session
    tab.choose("#colour", "annotation")
    tab.click("#legend button")
    tab.wait("document.querySelector('#annotation .bars')")
    assert tab.run("document.querySelector('#alert').hidden")


@needs_browser
@pytest.mark.browser
def test_the_browser_has_nothing_against_the_page(tab: Tab, url: str) -> None:
    # before the token was typed, the file that was no file, cells that were let go, those chosen too fast
    expected = ("401", "422", "404", "429")
    assert [one for one in tab.complaints() if not any(status in one for status in expected)] == []
    asked = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    assert len(asked) > 10
    assert [one for one in asked if not one.startswith(url)] == []
