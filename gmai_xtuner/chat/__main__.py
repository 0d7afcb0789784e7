# SPDX-License-Identifier: Apache-2.0

"""``python -m gmai_xtuner.chat MODEL [--image X ...] [--question TEXT] ...``

Answers go to standard output, everything else to standard error. Exit status: 0 when all went well, 1 after
an error, 2 if the command line can't be understood, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TextIO

from gmai_xtuner.cli import (
    add_limits,
    add_model_arguments,
    exit_status,
    load_from_arguments,
    only_the_report_on_stdout,
    positive_int,
)

if TYPE_CHECKING:
    from gmai_xtuner.chat.dialogue import Dialogue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and options.question is None:
        parser.error("--json is for --question")
    return exit_status(partial(_run, options))


def _run(options: argparse.Namespace) -> None:
    if hasattr(sys.stdin, "reconfigure"):  # checked with the question
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    with only_the_report_on_stdout() as stdout:
        from gmai_xtuner.chat.dialogue import Dialogue, open_picture
        from gmai_xtuner.generate import Sampling
        from gmai_xtuner.loading import describe

        sampling = Sampling(
            options.temperature, options.top_p, options.seed, options.repetition_penalty
        )
        pictures = [open_picture(path) for path in options.image]  # before a large model is read
        predictor = load_from_arguments(options)
        print(f"{options.model}\n{describe(predictor)}", file=sys.stderr, flush=True)
        dialogue = Dialogue(
            predictor,
            system=options.system,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            waiting=pictures,
        )
        if options.question is not None:
            _answer_once(dialogue, options, stdout)
        else:
            _talk(dialogue, stdout)


def _answer_once(dialogue: Dialogue, options: argparse.Namespace, stdout: TextIO) -> None:
    question = sys.stdin.read().rstrip("\n") if options.question == "-" else options.question
    began = time.monotonic()
    text = ""
    for piece in dialogue.ask(question):
        text += piece
        if not options.json:
            stdout.write(piece)
            stdout.flush()
    stream = dialogue.last
    assert stream is not None
    if options.json:
        result = {
            "model": options.model,
            "question": question,
            "images": options.image,
            "answer": text,
            "prompt_tokens": stream.prompt_tokens,
            "new_tokens": stream.new_tokens,
            "cut": stream.is_cut,
            "seconds": round(time.monotonic() - began, 3),
        }
        json.dump(result, stdout, ensure_ascii=False)
    stdout.write("\n")
    stdout.flush()
    if stream.is_cut and not options.json:
        print(f"(cut after {stream.new_tokens} tokens)", file=sys.stderr)


def _talk(dialogue: Dialogue, stdout: TextIO) -> None:
    from gmai_xtuner.chat.dialogue import Terminal

    terminal = Terminal(dialogue, stdout)
    if sys.stdin.isatty():
        terminal.say("Not for clinical use. /help has the commands.")
    for picture in dialogue.waiting:
        terminal.say(f"image {picture.path} waits for the first question")
    terminal.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m gmai_xtuner.chat",
        description="Talk to a trained model about images, in English or Chinese. Not for clinical use.",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    text = "PNG, JPEG, TIFF, ...; shown with the first question; may be given several times"
    add("--image", action="append", default=[], metavar="X", help=text)
    text = "answer this and leave; - reads it from standard input"
    add("--question", metavar="TEXT", help=text)
    add("--json", action="store_true", help="with --question: one JSON object")
    add("--system", metavar="TEXT", help="system prompt")
    group = parser.add_argument_group("answers")
    add_limits(group, ("--max-new-tokens", positive_int, 512, "at most"))
    add = group.add_argument
    add("--temperature", type=float, default=0.0, help="0, the default: the likeliest token")
    add("--top-p", type=float, default=1.0, help="with a temperature (default 1)")
    add("--seed", type=int, help="of the draw; the same one gives the same answer")
    text = "over 1: fewer repetitions (default 1)"
    add("--repetition-penalty", type=float, default=1.0, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
