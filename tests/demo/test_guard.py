# SPDX-License-Identifier: Apache-2.0

"""Who may come in, and with how much; spoken to as a web server does."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from starlette.requests import Request

from gmai_xtuner.core.addresses import is_loopback, reserved
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import staging
from gmai_xtuner.demo import server
from gmai_xtuner.demo.__main__ import main
from gmai_xtuner.demo.files import examples_of, installed_examples, open_files
from gmai_xtuner.demo.server import MULTIPART_OVERHEAD, Guard
from gmai_xtuner.demo.studies import Limits
from tests import warm
from tests.demo.teaching import write_export
from tests.tables import tables

TABLES = tables(__file__)


async def application(scope, receive, send):
    """Reads the whole body and says how long it was; gives up where the visitor has left."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        return
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("gone")
        length += len(message["body"])
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def talk(guard: Guard, *, kind="http", body: tuple[bytes, ...] = (b"",), **headers: str):
    """What the guard sends: status, headers, body; or the web socket's answer."""
    given = {"host": "127.0.0.1:7860", **{name.replace("_", "-"): v for name, v in headers.items()}}
    scope = {
        "type": kind,
        "method": "POST",
        "path": "/",
        "headers": [(n.encode(), v.encode()) for n, v in given.items()],
    }
    sent: list[dict] = []
    left = list(body)

    async def receive():
        if kind == "websocket":
            return {"type": "websocket.connect"}
        chunk = left.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    if kind == "websocket":
        return sent[0]["type"]
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], names, sent[1]["body"].decode()


def open_guard(**options) -> Guard:
    return Guard(application, **{"upload_bytes": 1000, "loopback": True, **options})


def test_a_visitor_is_served_and_told_to_load_nothing_from_elsewhere():
    status, headers, body = talk(open_guard(), body=(b"12", b"345"))
    assert (status, body) == (200, "5")
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(("headers", "served"), TABLES["other_sites_do_not_come_in"])
def test_other_sites_do_not_come_in(kind, headers, served):
    answer = talk(open_guard(), kind=kind, **headers)
    if kind == "websocket":
        assert answer == ("websocket.accept" if served else "websocket.close")
    else:
        assert answer[0] == (200 if served else 403)


def test_on_a_network_any_name_of_the_machine_is_right_but_not_another_origin():
    guard = open_guard(loopback=False)
    assert talk(guard, host="gpu7.hospital.lan", origin="http://gpu7.hospital.lan")[0] == 200
    assert talk(guard, host="gpu7.hospital.lan", origin="http://evil.example")[0] == 403


def test_the_name_of_a_proxy_is_taken_as_its_own():
    guard = open_guard(names=["Demo.Hospital.lan"])
    assert talk(guard, origin="https://demo.hospital.lan")[0] == 200
    assert talk(guard, host="demo.hospital.lan", origin="https://demo.hospital.lan")[0] == 200
    assert talk(guard, kind="websocket", origin="https://demo.hospital.lan") == "websocket.accept"
    assert talk(guard, origin="https://evil.example")[0] == 403
    assert talk(guard, host="evil.example")[0] == 403


def test_a_body_that_says_it_is_too_large_is_not_read():
    most = 1000 + MULTIPART_OVERHEAD
    assert talk(open_guard(), content_length=str(most))[0] == 200
    assert talk(open_guard(), content_length=str(most + 1))[0] == 413


def test_a_length_that_is_no_number_is_not_believed():
    scope = {"type": "http", "method": "POST", "path": "/"}
    scope["headers"] = [(b"host", b"localhost"), (b"content-length", "\u00b2".encode("latin-1"))]
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"abc", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(open_guard()(scope, receive, send))
    assert (sent[0]["status"], sent[1]["body"]) == (200, b"3")


def test_a_body_that_does_not_say_so_is_cut_off():
    chunk = b"x" * 30_000
    assert talk(open_guard(), body=(chunk,) * 2)[2] == "60000"
    status, _, body = talk(open_guard(), body=(chunk,) * 9)
    assert (status, body) == (413, "The upload is too large.")


def test_what_is_cut_off_is_not_handed_on():
    read = []

    async def reader(scope, receive, send):
        while (message := await receive())["type"] != "http.disconnect":
            read.append(len(message["body"]))

    chunk = b"x" * 30_000
    status, _, _ = talk(Guard(reader, upload_bytes=1000, loopback=True), body=(chunk,) * 9)
    assert (status, read) == (413, [30_000, 30_000])


def test_errors_of_the_application_are_not_swallowed():
    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        talk(Guard(broken, upload_bytes=10, loopback=True))


def test_a_visitor_who_leaves_during_an_upload_is_no_error():
    came = iter([{"type": "http.request", "body": b"x", "more_body": True}])

    async def receive():
        return next(came, {"type": "http.disconnect"})

    async def form(scope, receive, send):
        await Request(scope, receive).body()
        raise AssertionError("the body was whole")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(Guard(form, upload_bytes=100, loopback=True)(scope, receive, None))


CLOSED_PAGE = """
import gc, io, re
from types import SimpleNamespace
from fastapi import FastAPI
from nicegui import Client, ui
from PIL import Image
from starlette.testclient import TestClient
from gmai_xtuner.demo.conversation import Answering, Attached
from gmai_xtuner.demo.server import Demo
from gmai_xtuner.demo.studies import Limits

model = SimpleNamespace(name="m", facts="a stand-in", predictor=None)
demo = Demo(Answering([model], max_waiting=1), limits=Limits())
application = FastAPI()
ui.page("/")(demo.page)
ui.run_with(application, show_welcome_message=False)
picture = io.BytesIO()
Image.new("L", (32, 32)).save(picture, "PNG")
with TestClient(application) as visitor:
    place = re.search(r"/_nicegui/client/[\\w-]+/upload/\\d+", visitor.get("/").text)[0]
    visitor.post(place, files={"files": ("a.png", picture.getvalue())}).raise_for_status()
    (session,) = demo._open.values()
    while not session.tray:
        visitor.get("/nothing")
    del session

    def held():
        gc.collect()
        return sum(type(one) is Attached for one in gc.get_objects())

    print(held())
    visitor.portal.call(lambda: [client.delete() for client in list(Client.instances.values())])
    print(held(), demo.memory.used)
"""


@pytest.mark.slow  # NiceGUI has one application a process
def test_a_closed_page_leaves_no_image_in_memory():
    command = [sys.executable, "-c", CLOSED_PAGE]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.stdout.splitlines()[-2:] == ["1", "0 0"], child.stderr


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_an_upload_that_comes_to_a_halt_is_given_up(monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.05)
    came = iter([{"type": "http.request", "body": b"x", "more_body": True}])

    async def receive():
        for message in came:
            return message
        await asyncio.sleep(60)
        return None

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"127.0.0.1")]}
    guard = Guard(application, upload_bytes=100, loopback=True)
    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(asyncio.wait_for(guard(scope, receive, send), 5))


def test_nothing_stays_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    own = staging(tmp_path / "gmai_demo").name
    left = tmp_path / own.replace(str(os.getpid()), str(killed.pid))
    left.mkdir()
    (left / "a patient's scan").touch()
    with server._temporary_folder():
        with tempfile.NamedTemporaryFile(delete=False) as upload:
            pass
        assert Path(upload.name).parent == tmp_path / own
        assert not left.exists()
    assert not list(tmp_path.iterdir())


# --- The command: a mistake is one message and exit status 1, before anyone can connect ---


@pytest.fixture(scope="module")
def model(tiny_bases, tmp_path_factory) -> Path:
    """An export that knows nothing. Read only."""
    folder = tmp_path_factory.mktemp("untaught") / "model"
    return write_export(folder, tiny_bases, seed=0, lessons=())


def refused(capsys, *arguments: str | Path) -> str:
    """The one message of a command that ends with status 1."""
    assert main([*map(str, arguments), "--port", "0"]) == 1
    said = capsys.readouterr()
    assert "open http" not in said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no folder"),
        (["."], "can't be loaded"),
        (["MODEL", "nothing"], "nothing"),
        (["MODEL", "--llm", "x"], "has its own language model"),
        (["MODEL", "--host", "0.0.0.0"], "asks for no password"),
        (["MODEL", "--examples", "nothing"], "is no folder"),
        (["MODEL", "--examples", "."], "holds 0 files"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *(model if a == "MODEL" else a for a in arguments))


def test_a_damaged_model(capsys, tmp_path, model):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = next(broken.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refused(capsys, broken)
    assert "broken" in message
    assert "can't be loaded" in message


@pytest.mark.slow
def test_a_real_process_ends_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "gmai_xtuner.demo", tmp_path, "--port", "0"]
    done = warm.run(command, environment=os.environ, folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_taken_before_the_model_is_loaded_and_not_opened_yet():
    with reserved("127.0.0.1", 0) as own:
        port = own.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        own.listen()
        with pytest.raises(GMAIError, match=f"port {port} of 127.0.0.1 can't be had"):
            reserved("127.0.0.1", port).__enter__()
    with pytest.raises(GMAIError, match="is no address of this machine"):
        reserved("no.such.host.invalid", 0).__enter__()


@pytest.mark.parametrize("option", ["--max-upload-mb=0", "--max-pixels=-1", "--port=x"])
def test_options_that_make_no_sense(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["model", option])
    assert ended.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_every_built_in_example_opens():
    examples = installed_examples()
    assert len(examples) == 6
    for example in examples:
        (one,) = open_files([("example", example.path)], Limits())
        assert not isinstance(one.study, Exception), example
        assert example.path.is_file(), "it was moved"


def test_a_folder_of_examples(tmp_path):
    for name in ("b.png", "a.dcm", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    assert [example.name["en"] for example in examples_of(tmp_path)] == ["a", "b"]
