"""A headless Chromium over the DevTools protocol, for as long as a test needs it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Tab:
    """One page: it goes somewhere, runs scripts, is clicked and typed into as a person would."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._last = socket, 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **words: Any) -> dict[str, Any]:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": words}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self.events.append(message)

    def run(self, script: str) -> Any:
        """Evaluate an expression, a promise too; return its value."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, timeout_s: float = 100) -> Any:
        """Return the expression's value once it is true."""
        end = time.monotonic() + timeout_s
        whole = f"((found) => found instanceof Node ? true : found)({script})"
        while not (value := self.run(whole)):
            assert time.monotonic() < end, f"never true: {script}; the page says {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width: int, height: int, *, dark: bool = False, mobile: bool = False, ratio: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=mobile
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def mouse(self, kind: str, x: float, y: float, **words: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **({"button": "left", "clickCount": 1} | words))

    def click(self, selector: str) -> None:
        """Click the middle of what the selector finds, where a person would see it."""
        found = f"document.querySelector({json.dumps(selector)})"
        box = self.run(
            f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.mouse("mousePressed", *box)
        self.mouse("mouseReleased", *box)

    def choose(self, selector: str, value: str) -> None:
        """Choose in a list, as its own keyboard handling does."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.value = {json.dumps(value)}; {found}.dispatchEvent(new Event('change', {{bubbles: true}}))")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def key(self, key: str) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(key, ord(key.upper()) if len(key) == 1 else 0)
        words: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **words, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **words)

    def complaints(self) -> list[str]:
        """What the browser holds against the page: errors, what its policy forbade, what came from elsewhere."""
        self.run("0")
        found = []
        for event in self.events:
            words = event.get("params", {})
            if event.get("method") == "Log.entryAdded" and words["entry"]["level"] == "error":
                found.append(words["entry"]["text"])
            elif event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(words["exceptionDetails"])[:500])
        return found

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser() -> Iterator[Tab]:
    """Start a browser with one empty page; it is gone afterwards."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors = Path(folder, "stderr")
        with errors.open("w") as file:
            process = subprocess.Popen(
                [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", "about:blank"],
                stdout=subprocess.DEVNULL,
                stderr=file,
            )
        try:
            port = _port(Path(folder, "profile", "DevToolsActivePort"), errors)
            with connect(_page(port), max_size=2**28, open_timeout=30, proxy=None) as socket:
                yield Tab(socket)
        finally:
            process.terminate()
            process.wait(20)


def _port(path: Path, errors: Path) -> int:
    end = time.monotonic() + 30
    while not (path.is_file() and len(lines := path.read_text().splitlines()) > 1):
        assert time.monotonic() < end, errors.read_text()[-2_000:]
        time.sleep(0.05)
    return int(lines[0])


def _page(port: int) -> str:
    import httpx

    pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=30, trust_env=False).json()
    return str(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"))
