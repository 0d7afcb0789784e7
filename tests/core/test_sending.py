# SPDX-License-Identifier: Apache-2.0

"""Content of a source that forbids third parties never leaves this machine: asserted where bytes leave."""

import ast
import asyncio
import asyncio.selector_events
import contextlib
import random
import socket
from pathlib import Path
from typing import Any

import openai
import pytest

from data_tools import licences
from data_tools.readers.image_folder import Options as Folder
from gmai_xtuner.core.agreements import Agreement, Origin, agreement_of, benchmark_origin
from gmai_xtuner.core.errors import EndpointError
from gmai_xtuner.core.http import ChatServer, ServerFault
from gmai_xtuner.core.sending import Guard
from tests.api_server import Act, ApiServer
from tests.tables import tables
from tests.test_imports import modules

TABLES = tables(__file__)

CLOSED = Origin("the source cxr", "an agreement")
FREE = Origin("the source cells")
ELSEWHERE = "203.0.113.7"  # of RFC 5737: no machine of anyone's
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "secret finding"}]}


def source(licence: str, **more: Any) -> Folder:
    values = {"name": "s", "reader": "image_folder", "root": Path("/"), "licence": licence}
    return Folder(**values | more)


@pytest.mark.parametrize(
    ("licence", "names", "sent", "published"), TABLES["what_may_be_sent_and_published"]
)
def test_what_may_be_sent_and_published(licence, names, sent, published):
    made = source(licence, **names)
    assert (licences.permission_to_send(made).forbidden == "") is sent
    assert (licences.restriction(made, publish=True) == "") is published


def test_a_job_extends_the_table_and_what_forbids_counts():
    ours = Agreement(
        "Ours", True, False, licences=("ask anna",), text="May be sent.", read="2026-01-01"
    )
    assert licences.permission_to_send(source("Ask Anna"), [ours]).forbidden == ""
    assert "Ours" in licences.restriction(source("ask anna"), [ours], publish=True)
    lax = Agreement("Lax", True, True, licences=(".*",))
    found = agreement_of("PhysioNet Credentialed", [], [lax])
    assert found is not None
    assert found.name.startswith("PhysioNet")
    assert "mimic" in benchmark_origin("mimic-cxr-vqa test").name
    assert benchmark_origin("mimic-cxr-vqa test").forbidden
    assert not benchmark_origin("slake en test.json").forbidden


SPELLINGS = {  # host as it is written -> whether it is this machine
    "localhost": True, "127.0.0.1": True, "127.1": True, "2130706433": True, "0x7f000001": True,
    "017700000001": True, "[::1]": True, "[::ffff:127.0.0.1]": True, "[::ffff:7f00:1]": True,
    "LOCALHOST": True, "127.9.8.7": True,
    ELSEWHERE: False, "0.0.0.0": False, "[::]": False, "[::ffff:203.0.113.7]": False,
    "3405803783": False, "[2001:db8::1]": False, "10.0.0.5": False, "169.254.169.254": False,
}  # fmt: skip


@pytest.mark.parametrize(("host", "local"), SPELLINGS.items())
def test_a_host_is_judged_by_its_addresses(host, local):
    guard = Guard(f"http://{host}:9/v1")
    assert guard.local is local
    if local:
        guard.check([CLOSED])
    else:
        with pytest.raises(EndpointError, match=r"may not be sent to .*may_be_sent_to"):
            guard.check([FREE, CLOSED])
    guard.check([FREE])


def test_a_named_host_may_have_it_in_any_spelling_and_no_other():
    made = source("MIT", dataset="eICU", may_be_sent_to={
        "host": "[2001:DB8:0::1]", "retention": "none", "evidence": "contract of 2026-02-01"})  # fmt: skip
    Guard("https://[2001:db8::1]/v1").check([licences.permission_to_send(made)])
    with pytest.raises(EndpointError):
        Guard("https://[2001:db8::2]/v1").check([licences.permission_to_send(made)])
    for wrong in ("https://x/v1", "x:80", "", "*.org"):
        with pytest.raises(ValueError, match="host"):
            source("MIT", may_be_sent_to={"host": wrong, "retention": "none", "evidence": "e"})


class Recorder:
    """Stands where sockets are connected: keeps the addresses, none of which is reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
        self.tried: set[str] = set()
        self.names, self.resolve = names, socket.getaddrinfo
        loop = asyncio.selector_events.BaseSelectorEventLoop
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", lambda own, address: self.connect(address))
        monkeypatch.setattr(loop, "sock_connect", self.sock_connect)

    def getaddrinfo(self, host: Any, *arguments: Any, **more: Any) -> Any:
        found = self.names.get(host, [host])
        if host == "moved.example":
            found.append(found.pop(0))  # another answer each time
            found = found[:1]
        return [one for name in found for one in self.resolve(name, *arguments, **more)]

    def connect(self, address: Any) -> None:
        self.tried.add(address[0])
        raise ConnectionRefusedError("recorded")

    async def sock_connect(self, own: Any, address: Any) -> None:
        self.connect(address)


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
THIS_MACHINE = {"127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1"}


def test_ten_thousand_requests_of_closed_sources_reach_this_machine_alone(monkeypatch):
    rng = random.Random(7)
    hosts = [*SPELLINGS, "api.example", "moved.example", "mixed.example"]
    recorder = Recorder(
        monkeypatch,
        {
            "api.example": [ELSEWHERE],
            "mixed.example": ["127.0.0.1", ELSEWHERE],
            "moved.example": ["127.0.0.1", ELSEWHERE],
        },
    )
    named = Origin("other", "an agreement", frozenset({"a.example"}))
    counts = {True: 0, False: 0}
    for number in range(10_000):
        if number % 100 == 0:
            for name in PROXIES:
                monkeypatch.delenv(name, raising=False)
            if rng.random() < 0.5:
                monkeypatch.setenv(rng.choice(PROXIES[:3]), f"http://{ELSEWHERE}:3128")
        url = f"{rng.choice(('http', 'https'))}://{rng.choice(hosts)}:9/v1"
        origins = rng.choice(([CLOSED], [FREE, CLOSED], [named]))
        if number % 100:  # the way to the socket takes milliseconds
            with contextlib.suppress(EndpointError), Guard(url).carrying(origins):
                counts[True] += 1
                continue
            counts[False] += 1
        elif number % 200:
            with contextlib.suppress(EndpointError, ServerFault):
                ask(chat(url), origins)
        else:
            guard = Guard(url)
            made = openai.OpenAI(
                api_key="k", base_url=url, max_retries=0, http_client=guard.client()
            )
            faults = contextlib.suppress(EndpointError, openai.APIConnectionError)
            with faults, guard.carrying(origins):
                made.post("/chat/completions", cast_to=object, body=BODY)
    assert recorder.tried <= THIS_MACHINE
    assert {"127.0.0.1", "::1"} <= recorder.tried
    assert min(counts.values()) > 2_000
    with contextlib.suppress(ServerFault):  # the recorder would have seen it
        ask(chat(f"http://{ELSEWHERE}:9/v1"), [FREE])
    assert ELSEWHERE in recorder.tried


def ask(server: ChatServer, origins: list[Origin]) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        try:
            return await server.complete(BODY, origins)
        finally:
            await server.close()

    return asyncio.run(run())


def chat(url: str) -> ChatServer:
    return ChatServer(url, model="m", key=None, key_variable=None, timeout=5)


def test_a_hundred_requests_over_loopback_arrive_and_a_redirect_is_not_followed():
    with ApiServer() as server, ApiServer() as other:

        async def many() -> None:
            asked = chat(server.url)
            for _ in range(100):
                await asked.complete(BODY, [CLOSED])
            await asked.close()

        asyncio.run(many())
        assert len(server.requests) == 100
        server.script = lambda body, n: Act(
            status=307, headers={"location": f"{other.url}/chat/completions"}
        )
        with pytest.raises(EndpointError, match="HTTP 307"):
            ask(chat(server.url), [FREE])
        assert other.requests == []


def test_an_address_that_changes_later_is_never_connected_to(monkeypatch):
    names = {"moves.example": ["127.0.0.1", ELSEWHERE]}
    with ApiServer() as server:
        asked = server.url.replace("127.0.0.1", "moves.example").replace(
            "localhost", "moves.example"
        )
        real = socket.getaddrinfo

        def resolve(host: Any, *rest: Any, **more: Any) -> Any:
            found = names.get(host)
            return real(found.pop(0) if found else host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        made = chat(asked)
        assert names == {"moves.example": [ELSEWHERE]}
        assert ask(made, [CLOSED])["choices"]
        assert names == {"moves.example": [ELSEWHERE]}  # it was not asked again


def test_a_proxy_must_be_named_too_and_is_not_used_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://{ELSEWHERE}:3128")
    monkeypatch.setenv("no_proxy", "")
    guard = Guard("http://api.example/v1")
    assert guard.hosts == ["api.example", ELSEWHERE]
    with pytest.raises(EndpointError, match=ELSEWHERE):
        guard.check([Origin("s", "x", frozenset({"api.example"}))])
    guard.check([Origin("s", "x", frozenset({"api.example", ELSEWHERE}))])
    with ApiServer() as server:
        assert ask(chat(server.url), [CLOSED])["choices"]


def test_a_request_without_a_declared_source_is_not_sent():
    with ApiServer() as server:
        guard = Guard(server.url)
        bare = openai.OpenAI(
            api_key="k", base_url=server.url, max_retries=0, http_client=guard.client()
        )
        with pytest.raises(EndpointError, match="does not say whose content"):
            bare.post("/chat/completions", cast_to=object, body=BODY)
        assert server.requests == []


def test_a_host_without_an_address_is_no_connection():
    with pytest.raises(ServerFault, match="no connection"):
        ask(chat("http://nowhere.invalid/v1"), [FREE])


def test_nothing_else_of_the_product_makes_a_client():
    makers = {
        "AsyncOpenAI": "core.http",
        "OpenAI": "writers.openai_batch",
        **dict.fromkeys(
            ("DefaultAioHttpClient", "DefaultHttpxClient", "ClientSession"), "core.sending"
        ),
        **dict.fromkeys(("urlopen", "HTTPConnection", "AsyncClient", "create_connection"), ""),
    }
    wrong = []
    for module, path in modules():
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            name = (
                getattr(node.func, "attr", getattr(node.func, "id", ""))
                if isinstance(node, ast.Call)
                else ""
            )
            if name in makers and not (makers[name] and module.endswith(makers[name])):
                wrong.append(f"{module} calls {name}")
    assert wrong == []
