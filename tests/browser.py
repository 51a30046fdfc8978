"""A headless Chromium over WebDriver, with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AVAILABLE = shutil.which("chromedriver") is not None and shutil.which("chromium") is not None

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self.session = session

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return _call(f"{self.session}{path}", body)

    def open(self, page: Path) -> None:
        self.call("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """Returns what the body of a function returns in the page."""
        return self.call("/execute/sync", {"script": script, "args": []})

    def errors(self) -> list[str]:
        """Returns what the console has complained about since the last call."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def press(self, *keys: str) -> None:
        """Presses keys; arrow keys and the like by their WebDriver code points."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def want_no_motion(self, wanted: bool) -> None:
        """Says to pages whether the reader prefers reduced motion."""
        value = "reduce" if wanted else ""
        features = {"features": [{"name": "prefers-reduced-motion", "value": value}]}
        self.call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": features})
        self.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def screenshot(self, out: Path) -> bytes:
        """Returns a PNG of the whole page."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return innerWidth")
        shot = {
            "cmd": "Page.captureScreenshot",
            "params": {
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
            },
        }
        data = base64.b64decode(self.call("/goog/cdp/execute", shot)["data"])
        out.write_bytes(data)
        return data


@contextmanager
def browser(width: int, dark: bool = False) -> Iterator[Browser]:
    """Opens a window of some width in CSS pixels; a phone's where it is narrow."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    profile = tempfile.mkdtemp()
    quiet = subprocess.DEVNULL
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=quiet, stderr=quiet)
    try:
        base = f"http://127.0.0.1:{port}"
        _wait_for(base)
        dark_flag = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
        options: dict[str, Any] = {
            "args": [*FLAGS, *dark_flag, f"--user-data-dir={profile}", f"--window-size={width},900"]
        }
        if width < 600:
            options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": 844, "pixelRatio": 1.0}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _call(f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        window = Browser(f"{base}/session/{session}")
        try:
            yield window
        finally:
            _call(window.session, None, "DELETE")
    finally:
        driver.terminate()
        driver.wait()
        shutil.rmtree(profile, ignore_errors=True)


def _wait_for(base: str) -> None:
    for _ in range(200):
        try:
            if _call(f"{base}/status", None)["ready"]:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise TimeoutError("chromedriver does not answer")


def _call(url: str, body: dict[str, Any] | None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method or ("GET" if body is None else "POST"))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from None
