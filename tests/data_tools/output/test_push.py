# SPDX-License-Identifier: Apache-2.0

"""Uploading to a server on loopback that has the hub's interface, with its store of large files."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub.utils._http import reset_sessions

from data_tools.generate import main


class Hub(ThreadingHTTPServer):
    """Repositories by name: private or not, and path -> content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes | str] = {}
        self.large: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def reply(self, body: Any, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        hub = self.server
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if "/tree/" in self.path:
            self.reply(
                [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in hub.files]
            )
        else:
            self.reply({"id": name, "private": hub.private[name], "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self.read()
        self.reply({})

    def do_POST(self) -> None:
        hub, content = self.server, self.read()
        if self.path.endswith("/create"):
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            taken = name in hub.private
            hub.private.setdefault(name, asked["private"])
            self.reply({"url": f"{hub.url}/datasets/{name}"}, 409 if taken else 200)
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("parquet") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self.reply({"files": modes})
        elif self.path.endswith("/objects/batch"):
            objects = [
                one if one["oid"] in hub.large
                else one | {"actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]  # fmt: skip
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del hub.files[value["path"]]
            name = "/".join(self.path.split("/")[2:5])
            self.reply({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1"})
        else:
            self.reply({})  # the card's check


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        # Another test of this process may have kept the hub's client off the network.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        reset_sessions()
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server
        server.shutdown()
    monkeypatch.undo()
    reset_sessions()


OPEN = {"publishable": True, "parquet": True, "held_out": 0.3}


def test_the_hub_has_the_corpus_and_nothing_else(hub, classes, make_job, tmp_path, capsys):
    job, out = make_job({}, corpus=OPEN), tmp_path / "out"
    assert main([str(job)]) == 0
    hub.files["caption-00007.parquet"] = b"of an older corpus"
    hub.files["notes.md"] = b"of its owner"
    shards = list(out.rglob("*.parquet"))
    for name in ("mine.parquet", ".work/caption-00000.parquet"):
        (out / name).write_bytes(b"of the user")
    assert main([str(job), "--push", "ward/cells"]) == 0
    assert f"uploaded: {hub.url}/datasets/ward/cells/commit/1" in capsys.readouterr().out
    named = [out / "README.md", out / "summary.json", *shards, *out.glob("figures/*")]
    assert hub.files == {
        "notes.md": b"of its owner",
        **{str(file.relative_to(out)): file.read_bytes() for file in named},
    }
    assert any("held_out" in file.parts for file in shards)
    assert hub.private == {"ward/cells": True}

    sent, hub.large = hub.large, dict.fromkeys(hub.large, b"not sent again")
    assert main([str(job), "--push", "ward/cells"]) == 0
    assert set(hub.large.values()) == {b"not sent again"}
    assert sent

    hub.private["ward/cells"] = False
    assert main([str(job), "--push", "ward/cells"]) == 1
    assert "ward/cells is public. Add --public" in capsys.readouterr().err
    assert main([str(job), "--push", "ward/cells", "--public"]) == 0


@pytest.mark.parametrize(
    ("source", "corpus", "told"),
    [
        ({}, {"parquet": True}, "Set corpus: {publishable: true, parquet: true}"),
        ({}, {"publishable": True}, "Set corpus: {publishable: true, parquet: true}"),
        (
            {"licence": "ask Anna"},
            OPEN,
            "holds what may not be published: cells: the licence 'ask Anna'",
        ),
        ({"name": "other"}, OPEN, "cells, which is no source of the job"),
    ],
)
def test_what_the_job_keeps_back_now_is_not_sent(
    hub, classes, make_job, capsys, source, corpus, told
):
    assert main([str(make_job({"name": "cells"}, corpus=OPEN))]) == 0
    assert main([str(make_job({"name": "cells"} | source, corpus=corpus)), "--push", "a/b"]) == 1
    assert told in capsys.readouterr().err
    assert (hub.private, hub.files) == ({}, {})


def test_a_corpus_that_was_changed_is_not_sent(hub, classes, make_job, tmp_path, capsys):
    job = make_job({}, corpus=OPEN)
    assert main([str(job)]) == 0
    next((tmp_path / "out/images").rglob("*.*")).write_bytes(b"another")
    assert main([str(job), "--push", "a/b"]) == 1
    assert "is not as its manifest says" in capsys.readouterr().err
    assert (hub.private, hub.files) == ({}, {})


def test_a_hub_that_refuses_is_one_error(hub, classes, make_job, monkeypatch, capsys):
    job = make_job({}, corpus=OPEN)
    assert main([str(job)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(Requests, "do_POST", lambda self: self.reply({"error": "no"}, 403))
    assert main([str(job), "--push", "a/b"]) == 1
    assert capsys.readouterr().err.startswith("error: a/b can't be written: ")
