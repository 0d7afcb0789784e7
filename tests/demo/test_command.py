# SPDX-License-Identifier: Apache-2.0

"""``python -m gmai_xtuner.demo``: a mistake is one message and exit status 1, before anyone can connect."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gmai_xtuner.core.addresses import reserved
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.demo.__main__ import main
from gmai_xtuner.demo.files import examples_of, installed_examples, open_files
from gmai_xtuner.demo.studies import Limits
from tests.demo.teaching import write_export


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


def test_a_model_that_is_not_there(capsys, tmp_path):
    assert "there is no folder" in refused(capsys, tmp_path / "nothing")


def test_a_folder_that_is_no_model(capsys, tmp_path):
    assert "can't be loaded" in refused(capsys, tmp_path)


def test_a_damaged_model(capsys, tmp_path, model):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = next(broken.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refused(capsys, broken)
    assert "broken" in message
    assert "can't be loaded" in message


def test_a_second_model_that_is_not_there(capsys, tmp_path, model):
    assert "nothing" in refused(capsys, model, tmp_path / "nothing")


def test_a_base_that_is_not_wanted(capsys, model):
    assert "has its own language model" in refused(capsys, model, "--llm", "x")


@pytest.mark.slow
def test_a_real_process_ends_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gmai_xtuner.demo", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_address_than_loopback_has_to_be_meant(capsys, model):
    assert "asks for no password" in refused(capsys, model, "--host", "0.0.0.0")


def test_examples_that_are_not_there(capsys, tmp_path, model):
    assert "is no folder" in refused(capsys, model, "--examples", tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert "holds 0 files" in refused(capsys, model, "--examples", tmp_path / "empty")


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
