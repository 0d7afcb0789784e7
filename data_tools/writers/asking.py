"""What is asked about an item, in which order, and what its answers make of it; no network here.

`write` is a generator that yields questions and is sent the answers. The same one serves the loop that
waits for an answer and the Batch API, where an answer may come in another run of the command: given the same
answers, it asks the same questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_tools.items import Conversation, Item, Problem, SourceContext
from data_tools.records import Record
from data_tools.writers.outcome import Outcome, Reply, Task


class Prompt(Protocol):
    """`prompts.Prompt`, as far as it is needed here."""

    @property
    def system(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def image(self) -> str | None: ...
    @property
    def box_image(self) -> bool: ...
    @property
    def schema(self) -> dict[str, Any] | None: ...
    @property
    def max_tokens(self) -> int: ...


class Prompts(Protocol):
    """What writes the prompts and judges the answers: `prompts` and `checks` with a job's options."""

    def build(
        self, item: Item, record: Record, context: SourceContext, *, problems: Sequence[Problem]
    ) -> Prompt:
        """The question about an item; ``problems`` of the answer before."""

    def translate(
        self,
        conversation: Conversation,
        item: Item,
        record: Record,
        context: SourceContext,
        *,
        problems: Sequence[Problem],
    ) -> Prompt:
        """The question for a translation of ``conversation`` into the item's language."""

    def read_answer(self, text: str, item: Item, record: Record) -> Conversation | Problem:
        """The conversation in an answer, or why there is none in it."""

    def check(
        self, conversation: Conversation, item: Item, record: Record, context: SourceContext
    ) -> list[Problem]:
        """What is wrong with a conversation."""

    def check_translation(
        self, conversation: Conversation, original: Conversation, item: Item, context: SourceContext
    ) -> list[Problem]:
        """What a translation lost or changed."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question: ``attempt`` counts from 0 and is part of its name in the ledger."""

    item: Item
    prompt: Prompt
    attempt: int


# `Reply.finish` of a request that the server doesn't take; its text is the reason. Asking again is of no use.
REFUSED = "refused"

Asking = Generator[Ask, Reply, Outcome]


def write(task: Task, prompts: Prompts, *, retries: int, translate: bool) -> Asking:
    """Ask for the task's conversation until it passes the checks, ``retries`` times again at most.

    Args:
        task: what is to be written.
        prompts: writes the prompts and judges the answers.
        retries: of each step.
        translate: write Chinese items in English first and have them translated.
    """
    item, record, context = task.item, task.record, task.context
    if item.language != "zh" or not translate:
        return (
            yield from _until_right(
                item,
                retries,
                lambda problems: prompts.build(item, record, context, problems=problems),
                lambda text: prompts.read_answer(text, item, record),
                lambda made: prompts.check(made, item, record, context),
            )
        )
    english = dataclasses.replace(item, language="en")
    first = yield from _until_right(
        english,
        retries,
        lambda problems: prompts.build(english, record, context, problems=problems),
        lambda text: prompts.read_answer(text, english, record),
        lambda made: prompts.check(made, english, record, context),
    )
    if first.conversation is None:
        return dataclasses.replace(first, item=item)
    original = first.conversation
    second = yield from _until_right(
        item,
        retries,
        lambda problems: prompts.translate(original, item, record, context, problems=problems),
        lambda text: prompts.read_answer(text, item, record),
        lambda made: [
            *prompts.check(made, item, record, context),
            *prompts.check_translation(made, original, item, context),
        ],
    )
    counts = ("attempts", "prompt_tokens", "completion_tokens", "dollars", "requests", "cached")
    return dataclasses.replace(
        second, **{name: getattr(first, name) + getattr(second, name) for name in counts}
    )


def _until_right(
    item: Item,
    retries: int,
    build: Callable[[Sequence[Problem]], Prompt],
    read: Callable[[str], Conversation | Problem],
    check: Callable[[Conversation], list[Problem]],
) -> Asking:
    replies: list[Reply] = []
    problems: list[Problem] = []
    for attempt in range(retries + 1):
        prompt = build(problems)
        reply = yield Ask(item, prompt, attempt)
        replies.append(reply)
        found = spoilt(reply) or read(reply.text)
        conversation = None if isinstance(found, Problem) else found
        problems = [found] if isinstance(found, Problem) else check(found)
        if not problems or reply.finish == REFUSED:
            break
    asked = [reply for reply in replies if reply.new]
    return Outcome(
        item,
        None if problems else conversation,
        tuple(problems),
        shown(prompt),
        reply.refusal if reply.finish == REFUSED else reply.text or reply.refusal,
        attempts=len(replies),
        prompt_tokens=sum(reply.prompt_tokens for reply in asked),
        completion_tokens=sum(reply.completion_tokens for reply in asked),
        dollars=sum(reply.dollars for reply in asked),
        requests=len(asked),
        cached=len(replies) - len(asked),
    )


def spoilt(reply: Reply) -> Problem | None:
    """Why an answer isn't even read."""
    if reply.finish == REFUSED:
        return Problem(reply.text, reply.refusal)
    if reply.refusal:
        return Problem("the model refused", reply.refusal[:300])
    match reply.finish:
        case "length":
            return Problem("answer cut at its greatest length", "Write a shorter answer.")
        case "content_filter":
            return Problem("answer held back by the server's content filter")
        case "no choice":
            return Problem("answer without a choice")
    if not reply.text.strip():
        return Problem("empty answer")
    return None


def shown(prompt: Prompt) -> str:
    """The prompt as text, for the report."""
    picture = f"[picture {prompt.image}{', box drawn in' if prompt.box_image else ''}]\n"
    return f"{prompt.system}\n\n{picture if prompt.image else ''}{prompt.user}"
