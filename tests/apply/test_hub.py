"""Corrections on the Hugging Face Hub: pushed to and fetched from a stand-in on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40


class StandIn(BaseHTTPRequestHandler):
    """What a Hub answers to those who make a repository, commit small files and fetch them."""

    files: dict[str, dict[str, bytes]]  # by repository and name
    private: dict[str, Any]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        owner, name = "somebody", "tuned"
        repository = f"{owner}/{name}"
        if self.headers.get("Authorization") != "Bearer secret":
            self.answer(401, b'{"error": "Invalid username or password."}')
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.files.setdefault(repository, {})
            self.private[repository] = asked.get("private", asked.get("visibility") == "private")
            self.json({"url": f"http://127.0.0.1/{repository}", "id": repository, "name": repository})
        elif self.path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self.json({"errors": [] if head["library_name"] else ["no library"], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.json(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[repository][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"http://127.0.0.1/{repository}/commit/{COMMIT}"
            self.json({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})
        else:
            self.answer(404)

    def _chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def json(self, body: Any) -> None:
        self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        content = self.files.get(repository, {}).get(rest.partition("/")[2])
        if content is None:
            self.answer(404, b"", X_Error_Code="EntryNotFound" if repository in self.files else "RepoNotFound")
            return
        tag = hashlib.sha1(content).hexdigest()
        self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    handler = type("Handler", (StandIn,), {"files": {}, "private": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def python(code: str, hub: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    places = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + code],
        env={**os.environ, **places, "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


PRELUDE = """
import torch
from torch import nn
from eafo_dynamic import load_corrections, push_to_hub, wrap
from eafo_dynamic.errors import SiteError

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

def fails(call):
    try:
        call()
    except SiteError as error:
        print(error)
"""

PUSH = "print(push_to_hub(wrap(make(), eps_init=0.3), 'somebody/tuned', private=True, token='secret'))"
FETCH = """
model = load_corrections(make(), 'hf://somebody/tuned')
assert torch.equal(model(torch.ones(2, 4)), wrap(make(), eps_init=0.3)(torch.ones(2, 4)))
"""


def test_pushed_and_fetched_in_another_process(hub: Any, tmp_path: Path) -> None:
    done = python(PUSH, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(COMMIT)
    handler = hub.RequestHandlerClass
    assert handler.private == {"somebody/tuned": True}
    assert sorted(handler.files["somebody/tuned"]) == ["README.md", "eafo_dynamic.safetensors"]
    card = handler.files["somebody/tuned"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: eafo_dynamic\n")
    assert "# Corrections of 1 activations of Sequential" in card
    done = python(FETCH, hub, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_card_of_a_model_stays_its_own(hub: Any, tmp_path: Path) -> None:
    hub.RequestHandlerClass.files["somebody/tuned"] = {"README.md": b"# My model"}
    done = python(PUSH, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.RequestHandlerClass.files["somebody/tuned"]
    assert files["README.md"] == b"# My model"
    assert sorted(files) == ["README.md", "eafo_dynamic.md", "eafo_dynamic.safetensors"]


def test_what_goes_wrong_is_one_line(hub: Any, tmp_path: Path) -> None:
    code = """
fails(lambda: push_to_hub(wrap(make()), 'somebody/tuned', token='wrong'))
fails(lambda: push_to_hub(make(), 'somebody/tuned', token='secret'))
fails(lambda: load_corrections(make(), 'hf://somebody/absent'))
"""
    done = python(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    pushed, plain, fetched = done.stdout.strip().splitlines()
    assert pushed.startswith("somebody/tuned cannot be pushed to the Hub (")
    assert "401" in pushed
    assert plain.startswith("Sequential has no corrections")
    assert fetched.startswith("hf://somebody/absent cannot be fetched (")
