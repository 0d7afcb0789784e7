# SPDX-License-Identifier: Apache-2.0

"""The conversation as a person sees it: lines in, answers and commands out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TextIO

from gmai_xtuner.chat.dialogue import Dialogue, DialogueError
from gmai_xtuner.core.errors import GMAIError

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
    """Reads questions and commands until the end.

    Args:
        dialogue: the conversation.
        out: where answers go.
        log: where everything else goes.
        read: a line for a prompt; raises ``EOFError`` at the end. Default: the terminal's.
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
            "/undo": self._undo,
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
            with closing(dialogue.ask(question)) as pieces:  # type: ignore[type-var]
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
        for waiting, picture in enumerate(self.dialogue.add_images(_paths(rest)), before + 1):
            width, height = picture.image.size
            self.say(f"image {picture.path} ({width} x {height}) waits, {waiting} in all")

    def _images(self, rest: str) -> None:
        for title, pictures in (
            ("shown", self.dialogue.pictures),
            ("waiting", self.dialogue.waiting),
        ):
            for number, picture in enumerate(pictures, start=1):
                width, height = picture.image.size
                self.say(f"{title} {number}: {picture.path} ({width} x {height})")
        if not self.dialogue.pictures and not self.dialogue.waiting:
            self.say("no images; /image PATH adds one")

    def _undo(self, rest: str) -> None:
        self.say(f"taken back: {self.dialogue.undo()}")

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
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it; nothing is kept in a file)
        return input

    def read(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    return read
