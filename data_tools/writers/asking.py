# SPDX-License-Identifier: Apache-2.0

"""The questions about an item, in their order, and what their answers make of it; no network here.

`write` is a generator that yields questions and is sent the answers. The same one serves the writer that
waits for an answer and the Batch API, where an answer may come in another run of the command: given the same
answers, it asks the same questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_tools.checks import check_translation
from data_tools.items import Conversation, Item, Problem, SourceContext
from data_tools.records import Record
from data_tools.writers.ledger import Reply
from gmai_xtuner.core.errors import CorpusError

if TYPE_CHECKING:
    from data_tools.writers.prompts import Prompt, Prompts

REFUSED = "refused"
"""`Reply.finish` of a request that the server doesn't take; its text is the reason. It is not asked again."""


class CleanStop(CorpusError):
    """The writer stops before the work is done, nothing is lost, and running the job again goes on."""


class BudgetReached(CleanStop):
    """The next request could exceed the budget; those in flight have been waited for."""


class BatchesPending(CleanStop):
    """Batches are under way; a later run of the same job collects them."""


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation that is to be written, with everything that is known."""

    item: Item
    record: Record
    context: SourceContext


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item.

    Args:
        item: the task's.
        conversation: None if there is none that passed the checks.
        problems: why not; of the last attempt.
        prompt: the last one in full, as text; an image stands as its file's name.
        answer: the model's last, as it came.
        attempts: answers that were judged, from the server or from the ledger.
        prompt_tokens, completion_tokens, dollars: what this run spent on it; answers that the ledger had
            cost nothing.
        pending: the server's fault: the item is not decided and belongs into the next run.
        requests: answers that this run asked of the server.
        cached: answers that the ledger had.
    """

    item: Item
    conversation: Conversation | None
    problems: tuple[Problem, ...] = ()
    prompt: str = ""
    answer: str = ""
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    pending: bool = False
    requests: int = 0
    cached: int = 0

    def counting(self, replies: Sequence[Reply]) -> Outcome:
        """Return the outcome with the counts of these replies added."""
        asked = [reply for reply in replies if reply.new]
        return dataclasses.replace(
            self,
            attempts=self.attempts + len(replies),
            prompt_tokens=self.prompt_tokens + sum(reply.prompt_tokens for reply in asked),
            completion_tokens=self.completion_tokens
            + sum(reply.completion_tokens for reply in asked),
            dollars=self.dollars + sum(reply.dollars for reply in asked),
            requests=self.requests + len(asked),
            cached=self.cached + len(replies) - len(asked),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would cost.

    Args:
        requests: to be sent if every answer passes the checks at once.
        cached: answers that the ledger has.
        prompt_tokens, completion_tokens, dollars: as the ledger's earlier answers of this model lead to
            expect; without any of them equal to ``at_most``.
        dollars_at_most: every prompt at its upper bound, every answer at its greatest length, no retries.
    """

    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    dollars_at_most: float


@dataclass(frozen=True, slots=True)
class Ask:
    """A question: ``attempt`` counts from 0 and is part of its key in the ledger."""

    item: Item
    prompt: Prompt
    attempt: int


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
    replies: list[Reply] = []

    def direct(item: Item) -> Asking:
        return _until_right(
            item,
            retries,
            replies,
            lambda problems: prompts.build(item, record, context, problems=problems),
            lambda text: prompts.read_answer(text, item, record),
            lambda made: prompts.check(made, item, record, context),
        )

    if item.language == "en" or not translate:
        return (yield from direct(item)).counting(replies)
    first = yield from direct(dataclasses.replace(item, language="en"))
    original = first.conversation
    if original is None:
        return dataclasses.replace(first, item=item).counting(replies)
    second = yield from _until_right(
        item,
        retries,
        replies,
        lambda problems: prompts.translate(original, item, record, context, problems=problems),
        lambda text: prompts.read_answer(text, item, record),
        lambda made: [
            *prompts.check(made, item, record, context),
            *check_translation(made, original, context),
        ],
    )
    return second.counting(replies)


def _until_right(
    item: Item,
    retries: int,
    replies: list[Reply],
    build: Callable[[Sequence[Problem]], Prompt],
    read: Callable[[str], Conversation | Problem],
    check: Callable[[Conversation], list[Problem]],
) -> Asking:
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
    return Outcome(
        item,
        None if problems else conversation,
        tuple(problems),
        shown(prompt),
        reply.refusal if reply.finish == REFUSED else reply.text or reply.refusal,
    )


def spoilt(reply: Reply) -> Problem | None:
    """Return why an answer is not even read; None if it is."""
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
        case "no text":
            return Problem("answer that no UTF-8 can hold")
    if not reply.text.strip():
        return Problem("empty answer")
    return None


def shown(prompt: Prompt) -> str:
    """Return the prompt as text, for the report."""
    picture = f"[picture {prompt.image}{', box drawn in' if prompt.box_image else ''}]\n"
    return f"{prompt.system}\n\n{picture if prompt.image else ''}{prompt.user}"
