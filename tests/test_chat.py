# SPDX-License-Identifier: Apache-2.0

"""The conversation, its commands, and the command as a person and as a script run it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.chat.dialogue import Dialogue, DialogueError, Terminal, open_picture
from gmai_xtuner.cli import only_the_report_on_stdout
from gmai_xtuner.core.conversation import Turn, parse_raw
from gmai_xtuner.core.records import RawRecord
from gmai_xtuner.generate import PromptTooLong, user_turn
from tests import warm
from tests.commands.runner import ROOT

LENGTH = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Three PNG files of noise; the first one has a space in its name."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "left hand.png", folder / "sub" / "b.png", folder / "c.png"]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return paths


@pytest.fixture
def dialogue(predictor) -> Dialogue:
    return Dialogue(predictor, max_new_tokens=LENGTH)


def say(dialogue: Dialogue, *lines: str) -> tuple[str, str]:
    """What a terminal answers and says to these lines."""
    left, out, log = list(lines), io.StringIO(), io.StringIO()

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    Terminal(dialogue, out, log=log, read=read).run()
    return out.getvalue(), log.getvalue()


def test_several_turns_with_images_ask_the_model_what_training_would(dialogue, pictures, predictor):
    dialogue.system = "You are a radiologist."
    dialogue.add_images(pictures[0])
    first = "".join(dialogue.ask("图中显示什么？"))
    dialogue.add_images(pictures[1])
    dialogue.add_images(pictures[2])
    second = "".join(dialogue.ask("Is it <image> or <image>?"))
    third = "".join(dialogue.ask("Why?"))
    turns = [Turn("system", "You are a radiologist."), user_turn("图中显示什么？", 1)]
    images = [Image.open(path) for path in pictures]
    assert turns[1].text == "<image>\n图中显示什么？"
    assert predictor.generate(turns, images[:1], max_new_tokens=LENGTH) == first
    turns += [Turn("assistant", first), Turn("user", "Is it <image> or <image>?")]
    assert predictor.generate(turns, images, max_new_tokens=LENGTH) == second
    turns += [Turn("assistant", second), Turn("user", "Why?")]
    assert predictor.generate(turns, images, max_new_tokens=LENGTH) == third
    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("<image> or <image>?", r"2 <image> mark\(s\) in the question, but 1 image\(s\) wait"),
        (" ", "the question is empty"),
        ("half \ud800", "not UTF-8"),
    ],
)
def test_a_question_that_cant_be_asked_changes_nothing(dialogue, pictures, question, said):
    list(dialogue.ask("Is it CT?"))
    dialogue.add_images(pictures[0])
    before = list(dialogue.turns), list(dialogue.pictures), list(dialogue.waiting)
    with pytest.raises(DialogueError, match=said):
        dialogue.ask(question)
    assert (dialogue.turns, dialogue.pictures, dialogue.waiting) == before


def test_a_full_context_is_said_and_undo_makes_room(dialogue, predictor, monkeypatch):
    list(dialogue.ask("Is it CT?"))
    monkeypatch.setattr(predictor.model.llm.config, "max_position_embeddings", 60)
    _, log = say(dialogue, "x " * 60, "/undo", "ok?")
    assert "the model has 60 positions" in log
    assert [turn.text for turn in dialogue.turns][:1] == ["ok?"]
    with pytest.raises(PromptTooLong):
        dialogue.ask("x " * 60)


def test_a_model_that_fails_leaves_the_conversation(dialogue, pictures, predictor, monkeypatch):
    dialogue.add_images(pictures[0])

    original, calls = predictor.model.llm.forward, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(predictor.model.llm, "forward", fail)
        out, log = say(dialogue, "What is it?")
    assert out.strip(), "it fails in the middle of an answer"
    assert "the model failed, and the conversation is as it was: out of memory" in log
    assert (dialogue.turns, len(dialogue.waiting)) == ([], 1)
    assert say(dialogue, "What is it?")[0].strip() == dialogue.turns[1].text


def test_what_was_said_before_ctrl_c_stays(dialogue, pictures):
    dialogue.add_images(pictures[0])
    pieces = dialogue.ask("What is it?")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert dialogue.turns == [user_turn("What is it?", 1), Turn("assistant", said.strip())]
    assert (len(dialogue.pictures), dialogue.waiting) == (1, [])
    assert "".join(dialogue.ask("And?"))


def test_an_answer_that_names_the_mark_is_text(dialogue, pictures):
    dialogue.turns = [Turn("user", "Which mark?"), Turn("assistant", "It is <image>.")]
    dialogue.add_images(pictures[0])
    assert "".join(dialogue.ask("And this?"))
    with pytest.raises(DialogueError, match="belongs in user turns only"):
        dialogue.record()


def test_commands(dialogue, pictures):
    out, log = say(
        dialogue,
        "/images",
        f"/image {pictures[0]}",  # with a space, as a whole
        f"/image '{pictures[1]}' {pictures[2]}",
        "/images",
        "Which \\",
        "one?",
        "/nonsense",
        "/image",
        "/save",
        "//path is a question",
        "/undo",
        "/undo",
        "/images",
        "/undo",
        "/reset",
        "/help",
        "/quit",
        "never asked",
    )
    assert len(out.splitlines()) == 2
    for line in (
        "no images",
        "waits, 1 in all",
        "waits, 3 in all",
        "waiting 3: " + str(pictures[2]),
        "there is no command /nonsense",
        "name the file: /image PATH",
        "name the file: /save FILE",
        "taken back: /path is a question",
        "taken back: <image>\n<image>\n<image>\nWhich \none?",
        "error: nothing was asked yet",
        "a new conversation",
        "/save FILE       write",
    ):
        assert line in log
    assert (dialogue.turns, dialogue.pictures, dialogue.waiting) == ([], [], [])


@pytest.mark.parametrize("name", ["x" * 300, "~nobody_of_this_name/a.png", "a\0b"])
def test_a_name_that_no_file_can_have_is_an_error_and_no_end(dialogue, name):
    _, log = say(dialogue, f"/image {name}", f"/save {name}.json", "/quit")
    assert log.count("error: ") == 2


def test_images_of_one_command_wait_all_or_none(dialogue, pictures):
    _, log = say(dialogue, f"/image '{pictures[1]}' missing.png", "/quit")
    assert "missing.png' can't be opened" in log
    assert "waits" not in log
    assert dialogue.waiting == []


def test_a_saved_conversation_is_a_training_record(dialogue, pictures, tmp_path):
    dialogue.system = "Be brief."
    dialogue.add_images(pictures[0])
    dialogue.add_images(pictures[1])
    answer = "".join(dialogue.ask("哪一个？"))
    target = tmp_path / "talk.json"
    _, log = say(dialogue, f"/save {target}", f"/save {target}", f"/save {target}.txt")
    assert log.count(f"saved to {target}") == 2
    assert "give a name that ends in .json or .jsonl" in log
    (record,) = json.loads(target.read_text(encoding="utf-8"))
    assert record["image_root"] == str(pictures[0].parent)
    conversation = parse_raw(RawRecord("1", "", record), dataset="d")
    assert conversation.images == ("left hand.png", "sub/b.png")
    assert conversation.turns == (
        Turn("system", "Be brief."),
        Turn("user", "<image>\n<image>\n哪一个？"),
        Turn("assistant", answer.strip()),
    )
    assert target.stat().st_mode & 0o777 == 0o600
    dialogue.save(tmp_path / "talk.jsonl")
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == record


def test_saving_replaces_no_file_of_others_and_needs_an_answer(dialogue, tmp_path):
    with pytest.raises(DialogueError, match="no answer to save"):
        dialogue.save(tmp_path / "a.json")
    list(dialogue.ask("Is it CT?"))
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(DialogueError, match="exists already"):
        dialogue.save(tmp_path / "a.json")
    with pytest.raises(DialogueError, match="can't be written: No such file"):
        dialogue.save(tmp_path / "no" / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["a.dcm", "a.nii.gz", "A.NRRD", "no_suffix"])
def test_volumes_and_dicom_are_sent_to_the_page_and_the_builder(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(DialogueError, match=r"gmai_xtuner.demo MODEL.*data_tools/generate.py JOB"):
        open_picture(tmp_path / name)


def test_an_image_that_cant_be_opened_says_why(tmp_path):
    with pytest.raises(DialogueError, match=r"can't be opened\. Check the path"):
        open_picture(tmp_path / "no.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DialogueError, match="in none of the formats"):
        open_picture(tmp_path / "text.png")


def chat(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "LANG": "C", "PYTHONUTF8": "0"}
    return warm.run(command(*arguments), environment=variables, folder=ROOT, stdin=stdin)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "gmai_xtuner.chat", *map(str, arguments)]


@pytest.mark.slow
def test_one_question_gives_the_answer_alone(export, pictures, predictor):
    done = chat(
        export, "--image", pictures[0], "--question", "图中显示什么？", "--max-new-tokens", LENGTH
    )
    answer = predictor.answer("图中显示什么？", [pictures[0]], max_new_tokens=LENGTH)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer + "\n"
    log = done.stderr
    assert re.search(r"language model +688,768  float32 +2\.6 MiB\n", log)
    assert re.search(r"all +1,256,704 +4\.8 MiB\n", log)
    assert "at most 32,768 tokens" in log
    assert f"(cut after {LENGTH} tokens)" in log


@pytest.mark.slow
def test_one_question_as_json_from_standard_input(export, pictures, predictor):
    sampling = [
        "--temperature",
        "1.5",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "--repetition-penalty",
        "1.1",
    ]
    done = chat(
        export, "--image", pictures[0], "--image", pictures[1], "--question", "-", "--json", "--system", "S",
        "--max-new-tokens", "5", *sampling, stdin="<image>和<image>？\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["question"] == "<image>和<image>？"
    assert result["images"] == [str(path) for path in pictures[:2]]
    assert (result["new_tokens"], result["cut"]) == (5, True)
    assert result["answer"]
    assert result["prompt_tokens"] > 2 * 64


def test_what_libraries_print_is_no_answer(capfd):
    with only_the_report_on_stdout() as stdout:
        os.write(1, b"printed")
        stdout.write("胸部")
    os.write(1, b" afterwards")
    assert capfd.readouterr() == ("胸部 afterwards", "printed")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--question", "<image>?"), 1, "error: 1 <image> mark(s) in the question, but 0 image(s)"),
        (("--image", "no.png", "--question", "x"), 1, "Check the path"),
        (("--json",), 2, "--json is for --question"),
        (("--temperature", "-1"), 1, "error: temperature must be 0, or 1e-6"),
    ],
)
def test_the_exit_status_is_honest(export, capfd, arguments, status, said):
    from gmai_xtuner.chat.__main__ import main

    try:
        returned = main([str(export), *arguments])
    except SystemExit as left:
        returned = left.code
    out, log = capfd.readouterr()
    assert (returned, out) == (status, "")
    assert said in log


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(export, tmp_path):
    target = tmp_path / "talk.json"
    process = subprocess.Popen(
        command(export, "--max-new-tokens", 30_000),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    try:
        process.stdin.write("Is it CT? 是吗？\n".encode())
        process.stdin.flush()
        said = process.stdout.read(1)
        assert said, process.stderr.read().decode()
        process.send_signal(signal.SIGINT)
        rest = f"/save {target}\n"
        out, log = process.communicate(rest.encode(), timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, log.decode()
    assert "(stopped)" in log.decode()
    (record,) = json.loads(target.read_text(encoding="utf-8"))
    assert record["conversations"] == [
        {"from": "human", "value": "Is it CT? 是吗？"},
        {"from": "gpt", "value": (said + out).decode("utf-8").strip()},
    ]
