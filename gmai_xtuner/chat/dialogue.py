# SPDX-License-Identifier: Apache-2.0

"""A conversation with a model: what was said and shown; and the terminal in which a person has it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.core.conversation import Turn, parse_raw
from gmai_xtuner.core.errors import GMAIError, ImageError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.core.records import RawRecord
from gmai_xtuner.generate import GREEDY, AnswerStream, Predictor, Sampling, user_turn

VOLUMES = (".dcm", ".dicom", ".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


class DialogueError(GMAIError):
    """A question, an image or a file can't be used; the conversation is as it was."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of the conversation; decoded once, so that a file which changes later changes nothing."""

    path: Path
    image: Image.Image


@dataclass
class Dialogue:
    """Questions and answers in turn, with a ``system`` turn, if any.

    ``waiting`` are the images that go with the next question. A question that fails, whatever the reason,
    leaves everything as it was.
    """

    predictor: Predictor
    system: str | None = None
    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    turns: list[Turn] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    waiting: list[Picture] = field(default_factory=list)
    last: AnswerStream | None = None
    _saved: set[Path] = field(default_factory=set)

    def add_images(self, *paths: str | Path) -> list[Picture]:
        """Open images for the next question, all or none (errors: :func:`open_picture`)."""
        pictures = [open_picture(path) for path in paths]
        self.waiting += pictures
        return pictures

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces, as they come.

        Closing the iterator, or Ctrl-C, stops the model; what was said till then stays in the
        conversation. Without ``<image>`` marks in the question, waiting images come before it, in order.

        Raises:
            DialogueError: no question, or marks and waiting images differ in number.
            PromptTooLong: the conversation fills the model's positions.
        """
        turn = self._turn(question)
        pictures = [*self.pictures, *self.waiting]
        turns = [*self._system(), *self.turns, turn]
        self.last = stream = self.predictor.stream(
            turns,
            [picture.image for picture in pictures],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
        )
        return self._pieces(stream, turn)

    def _pieces(self, stream: AnswerStream, turn: Turn) -> Iterator[str]:
        answer = ""
        try:
            for piece in stream:
                answer += piece
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            self._keep(turn, answer)
            raise
        finally:
            stream.close()
        self._keep(turn, answer)

    def _keep(self, turn: Turn, text: str) -> None:
        if text.strip():  # without an answer the question was not asked
            self.turns += [turn, Turn("assistant", text.strip())]
            self.pictures += self.waiting
            self.waiting = []

    def _turn(self, question: str) -> Turn:
        try:
            question.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DialogueError(
                "the question is not UTF-8. Set the terminal, or LANG, to UTF-8"
            ) from error
        if not question.strip():
            raise DialogueError("the question is empty. Write what you want to know")
        marks, images = question.count(IMAGE_TOKEN), len(self.waiting)
        if marks and marks != images:
            raise DialogueError(
                f"{marks} {IMAGE_TOKEN} mark(s) in the question, but {images} image(s) wait for it. Give one "
                "image for each mark, or leave the marks out: then all images come first"
            )
        return user_turn(question, images)

    def _system(self) -> tuple[Turn, ...]:
        return (Turn("system", self.system),) if self.system else ()

    def reset(self) -> None:
        """Forget what was said and shown; the system turn stays."""
        self.turns, self.pictures, self.waiting = [], [], []

    def undo(self) -> str:
        """Take the last question and answer back; return the question, whose images wait again."""
        if not self.turns:
            raise DialogueError("nothing was asked yet")
        question = self.turns[-2].text
        del self.turns[-2:]
        kept = len(self.pictures) - question.count(IMAGE_TOKEN)
        self.waiting = [*self.pictures[kept:], *self.waiting]
        del self.pictures[kept:]
        return question

    def record(self) -> dict[str, Any]:
        """The conversation in the form of a training record, see :mod:`gmai_xtuner.core.conversation`.

        ``image_root`` is the folder below which all images lie, for the mixture file.

        Before the first answer, or where it can't be a record, it is a ``DialogueError``.
        """
        if not self.turns:
            raise DialogueError("there is no answer to save yet")
        record: dict[str, Any] = {"id": "chat"}
        if self.pictures:
            paths = [picture.path for picture in self.pictures]
            root = os.path.commonpath([path.parent for path in paths])
            record["image"] = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
            record["image_root"] = root
        record["conversations"] = [
            {"from": _NAMES[turn.role], "value": turn.text}
            for turn in (*self._system(), *self.turns)
        ]
        try:
            parse_raw(RawRecord("this conversation", "", record), dataset="chat")
        except GMAIError as error:
            raise DialogueError(f"the conversation can't be a record: {error}") from error
        return record

    def save(self, path: str | Path) -> Path:
        """Write :meth:`record`: a list with one record (.json), or a line (.jsonl). The whole path.

        A file that this conversation wrote earlier is replaced, any other never (``DialogueError``).
        """
        target = _whole(path)
        if target.suffix not in (".json", ".jsonl"):
            raise DialogueError(f"{str(target)!r}: give a name that ends in .json or .jsonl")
        if os.path.lexists(target) and target not in self._saved:
            raise DialogueError(f"{str(target)!r} exists already. Give another name")
        record = self.record()
        content, indent = ([record], 1) if target.suffix == ".json" else (record, None)
        text = json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
        try:
            replace_text(target, text, mode=0o600)  # it may speak of a patient
        except OSError as error:
            raise DialogueError(f"{str(target)!r} can't be written: {error.strerror}") from error
        self._saved.add(target)
        return target


def open_picture(path: str | Path) -> Picture:
    """An image file, read as in training.

    Raises:
        DialogueError: it can't be opened; says what to do.
    """
    whole = _whole(path)
    if whole.name.lower().endswith(VOLUMES) or _is_dicom(whole):
        raise DialogueError(
            f"{str(path)!r} is DICOM or a volume, from which a slice and a window have to be chosen first: "
            "open it in the page (python -m gmai_xtuner.demo MODEL), or make PNG files of it with the "
            "corpus builder (python data_tools/generate.py JOB)"
        )
    try:
        return Picture(whole, open_rgb(whole))
    except ImageError as error:
        if error.reason == "missing_image":
            raise DialogueError(f"image {str(whole)!r} can't be opened. Check the path") from error
        raise DialogueError(str(error)) from error


def _whole(path: str | Path) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # ~ of a user that isn't there
        raise DialogueError(f"{str(path)!r}: {error}") from error


def _is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark, which follows 128 free bytes; many have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False  # open_rgb says why


# --- the terminal ---

HELP = """\
  /image PATH ...  add an image to the next question, or several
  /images          which images were shown, and which wait for the next question
  /undo            take the last question and answer back
  /reset           begin anew; the system prompt stays
  /save FILE       write the conversation as a training record (.json or .jsonl)
  /help            this
  /quit            leave; so does Ctrl-D

A line that ends in \\ goes on in the next one; // begins a question with /. Write <image> in a question
where an image belongs, otherwise images come first. Ctrl-C stops an answer: what was said stays."""


class Terminal:
    """Reads questions and commands until the end; answers go to ``out``, everything else to ``log``.

    ``read`` gives a line for a prompt and raises ``EOFError`` at the end; default: the terminal's.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        out: TextIO,
        *,
        log: TextIO | None = None,
        read: Callable[[str], str] | None = None,
    ) -> None:
        self.dialogue, self.out = dialogue, out
        self.log = log or sys.stderr
        self.read = read or _reader()
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/images": self._images,
            "/undo": lambda _: self.say(f"taken back: {self.dialogue.undo()}"),
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self.say(HELP),
        }

    def run(self) -> None:
        """Until ``/quit``, or the end of the input."""
        while True:
            try:
                line = self._line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.say("\n(/quit or Ctrl-D leaves)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line:
                self.handle(line)

    def handle(self, line: str) -> None:
        """One command or question; an error is told, and changes nothing."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line.partition(" ")
                if name not in self.commands:
                    raise DialogueError(
                        f"there is no command {name}; /help has them all. Write // to begin a question with /"
                    )
                self.commands[name](rest.strip())
            else:
                self.answer(line.removeprefix("/") if line.startswith("//") else line)
        except GMAIError as error:
            self.say(f"error: {error}")

    def answer(self, question: str) -> None:
        """Ask, and show the answer as it comes."""
        dialogue = self.dialogue
        try:
            with contextlib.closing(dialogue.ask(question)) as pieces:  # type: ignore[type-var]
                try:
                    for piece in pieces:
                        self.out.write(piece)
                        self.out.flush()
                finally:
                    self.out.write("\n")
                    self.out.flush()
        except KeyboardInterrupt:
            self.say("(stopped)")
            return
        except RuntimeError as error:  # torch's, such as too little memory
            self.say(
                f"error: the model failed, and the conversation is as it was: {error}. If memory is "
                "short: /reset, fewer images, or --dtype bf16"
            )
            return
        if dialogue.last is not None and dialogue.last.is_cut:
            self.say(f"(cut after {dialogue.last.new_tokens} tokens; --max-new-tokens allows more)")

    def say(self, text: str) -> None:
        """To the person, not into the answers."""
        print(text, file=self.log, flush=True)

    def _line(self) -> str:
        text = self.read(">>> ")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self.read("... ")
        return text

    def _image(self, rest: str) -> None:
        before = len(self.dialogue.waiting)
        for waiting, picture in enumerate(self.dialogue.add_images(*_paths(rest)), before + 1):
            width, height = picture.image.size
            self.say(f"image {picture.path} ({width} x {height}) waits, {waiting} in all")

    def _images(self, rest: str) -> None:
        shown, waiting = self.dialogue.pictures, self.dialogue.waiting
        for title, pictures in (("shown", shown), ("waiting", waiting)):
            for number, picture in enumerate(pictures, start=1):
                width, height = picture.image.size
                self.say(f"{title} {number}: {picture.path} ({width} x {height})")
        if not shown and not waiting:
            self.say("no images; /image PATH adds one")

    def _reset(self, rest: str) -> None:
        self.dialogue.reset()
        self.say("a new conversation")

    def _save(self, rest: str) -> None:
        if not rest:
            raise DialogueError("name the file: /save FILE")
        self.say(f"saved to {self.dialogue.save(rest)}")


def _paths(rest: str) -> list[str]:
    """What follows ``/image``: one path with spaces in it, or several as in a shell."""
    try:
        if rest and Path(rest).expanduser().exists():
            return [rest]
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown user's ~, a NUL
        pass
    try:
        paths = shlex.split(rest)
    except ValueError as error:
        raise DialogueError(f"{rest!r}: {error}") from error
    if not paths:
        raise DialogueError("name the file: /image PATH")
    return paths


def _reader() -> Callable[[str], str]:
    """The terminal with line editing, or the lines of a file or pipe without prompts."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it; nothing is kept in a file)
        return input

    def read(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    return read
