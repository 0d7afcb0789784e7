# SPDX-License-Identifier: Apache-2.0

"""The questions about an item, in their order, what their answers make of it, and what they may cost.

`ModelWriter.questions` is a generator that yields requests and is sent the answers. The same one serves the
writer that waits for an answer and the Batch API, where an answer may come in another run of the command:
given the same answers, it asks the same questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import platformdirs

from data_tools.checks import check_translation
from data_tools.items import Conversation, Item, Problem, Task
from data_tools.options import OpenAIOptions
from data_tools.writers.ledger import Expense, Ledger, Reply
from data_tools.writers.prompts import Prompt, Prompts
from data_tools.writers.request import Request, expense
from gmai_xtuner.core.agreements import Origin
from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.http import ServerFault

REFUSED = "refused"
"""`Reply.finish` of a request that the server doesn't take; its text is the reason. It is not asked again."""
_SPOILT = {
    "length": Problem("answer cut at its greatest length", "Write a shorter answer."),
    "content_filter": Problem("answer held back by the server's content filter"),
    "no choice": Problem("answer without a choice"),
    "no text": Problem("answer that no UTF-8 can hold"),
}
"""`Reply.finish` -> why an answer isn't read."""

O = TypeVar("O", bound=OpenAIOptions)  # noqa: E741


class CleanStop(CorpusError):
    """The writer stops before the work is done, nothing is lost, and running the job again goes on."""


class BudgetReached(CleanStop):
    """The next request could exceed the budget; those in flight have been waited for."""


class BatchesPending(CleanStop):
    """Batches are under way; a later run of the same job collects them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item.

    ``problems`` of the last attempt say why there is no conversation. ``prompt`` is the last one as text,
    ``answer`` the model's last as it came, ``attempts`` the answers that were judged. Tokens, ``dollars`` and
    ``requests`` are what this run asked of the server, ``cached`` what the ledger had. ``pending``: the
    server's fault; the item is not decided and belongs into the next run.
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


Questions = Generator[Request, Reply, Outcome]


def step(questions: Questions, said: Reply | ServerFault | None = None) -> Request | Outcome:
    """Send what the server said, nothing at first; return the next question, or the outcome."""
    try:
        if said is None:
            return next(questions)
        return questions.send(said) if isinstance(said, Reply) else questions.throw(said)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class ModelWriter(Generic[O]):
    """What the writers that ask a model have in common.

    ``folder`` is the corpus, below which images lie; ``job`` whose expenses these are, the same in every run;
    ``origins`` say where the content of a source under a licence may go.
    """

    def __init__(
        self,
        options: O,
        prompts: Prompts,
        *,
        folder: Path,
        job: str,
        origins: Mapping[tuple[str, str], Origin],
    ) -> None:
        self.options, self.prompts, self.folder, self.job = options, prompts, folder, job
        self.origins = origins

    def ledger(self) -> Ledger:
        """Open the ledger for a run of this job: its ``cache``, else that of all jobs of the user."""
        path = self.options.cache or platformdirs.user_cache_path("gmai_xtuner") / "answers.sqlite"
        return Ledger(path, job=self.job)

    def questions(self, task: Task) -> Questions:
        """Ask for the task's conversation until it passes the checks, ``retries`` times again at most."""
        item, replies = task.item, list[Reply]()
        translate = item.language != "en" and self.options.chinese == "translate"
        english = dataclasses.replace(task, item=dataclasses.replace(item, language="en"))
        outcome = yield from self._until_right(english if translate else task, None, replies)
        if translate and outcome.conversation is not None:
            outcome = yield from self._until_right(task, outcome.conversation, replies)
        new = [reply for reply in replies if reply.new]
        return dataclasses.replace(
            outcome,
            item=item,
            attempts=len(replies),
            prompt_tokens=sum(reply.cost.prompt_tokens for reply in new),
            completion_tokens=sum(reply.cost.completion_tokens for reply in new),
            dollars=sum(reply.cost.dollars for reply in new),
            requests=len(new),
            # The next run finds those of an undecided item again.
            cached=0 if outcome.pending else len(replies) - len(new),
        )

    def _until_right(
        self, task: Task, original: Conversation | None, replies: list[Reply]
    ) -> Questions:
        """Ask for an item, or for the translation of ``original``."""
        prompts, item = self.prompts, task.item
        problems: list[Problem] = []
        for attempt in range(self.options.retries + 1):
            if original is None:
                prompt = prompts.build(task, problems=problems)
            else:
                prompt = prompts.translate(original, task, problems=problems)
            try:
                reply = yield Request.of(task, prompt, attempt, self.options, self.folder)
            except ServerFault as fault:
                problem = Problem(fault.reason, fault.detail)
                return Outcome(item, None, (problem,), shown(prompt), pending=True)
            replies.append(reply)
            found = spoilt(reply) or prompts.read_answer(reply.text, task)
            if isinstance(found, Problem):
                problems = [found]
            else:
                problems = prompts.check(found, task)
                if original is not None:
                    problems = [*problems, *check_translation(found, original, task.context)]
            if not problems or reply.finish == REFUSED:
                break
        answer = reply.refusal if reply.finish == REFUSED else reply.text or reply.refusal
        conversation = None if problems or isinstance(found, Problem) else found
        return Outcome(item, conversation, tuple(problems), shown(prompt), answer)

    def estimate(self, tasks: Iterable[Task]) -> dict[str, float]:
        """Return what these tasks would cost, without a request and without a key.

        ``requests`` are to be sent if every answer passes the checks at once, ``cached`` answers are the
        ledger's. Tokens and ``dollars`` are as its earlier answers of this model lead to expect;
        ``dollars_at_most`` has every prompt at its upper bound, every answer at its greatest length, no
        retries. A `CorpusError` if an image or the ledger can't be read.
        """
        options = self.options
        requests = cached = 0
        at_most = Expense()
        seen: set[str] = set()
        with self.ledger() as ledger:
            for task in tasks:
                questions = self.questions(task)
                found = step(questions)
                while isinstance(found, Request) and (reply := ledger.answer(found.key)):
                    cached += 1
                    found = step(questions, reply)
                if isinstance(found, Outcome) or found.key in seen:
                    continue
                seen.add(found.key)
                # A translation is a second request, about as large as the first.
                steps = 2 if options.chinese == "translate" and found.item != task.item else 1
                requests += steps
                at_most = at_most.plus(found.at_most, times=steps)
            shares = ledger.shares(options.model) or (1.0, 1.0)
        prompts, answers = (
            round(most * share) for most, share in zip(at_most[:2], shares, strict=True)
        )
        likely = expense(prompts, answers, options)
        counts = {"requests": requests, "cached": cached, **likely._asdict()}
        return counts | {"dollars_at_most": at_most.dollars}


def spoilt(reply: Reply) -> Problem | None:
    """Return why an answer is not even read; None if it is."""
    if reply.finish == REFUSED:
        return Problem(reply.text, reply.refusal)
    if reply.refusal:
        return Problem("the model refused", reply.refusal[:300])
    return _SPOILT.get(reply.finish) or (None if reply.text.strip() else Problem("empty answer"))


def shown(prompt: Prompt) -> str:
    """Return the prompt as text, for the report."""
    picture = f"[picture {prompt.image}{', box drawn in' if prompt.box_image else ''}]\n"
    return f"{prompt.system}\n\n{picture if prompt.image else ''}{prompt.user}"


class Account:
    """What a job has spent, at first by earlier runs, and what its requests under way can still cost."""

    def __init__(self, options: OpenAIOptions, spent: Expense) -> None:
        self.budget, self.spent, self.reserved = options.budget, spent, Expense()

    def fits(self, at_most: Expense) -> bool:
        """Return whether the budget bears ``at_most`` besides what is spent and reserved."""
        total = self.spent.plus(self.reserved).plus(at_most)
        dollars, tokens = self.budget.dollars, self.budget.tokens
        # Sums of many small floats: a billionth of a dollar is no overdraft.
        return (dollars is None or total.dollars <= dollars + 1e-9) and (
            tokens is None or total.tokens <= tokens
        )

    def reserve(self, at_most: Expense) -> None:
        self.reserved = self.reserved.plus(at_most)

    def settle(self, at_most: Expense, actual: Expense) -> None:
        """Replace what was reserved as ``at_most`` by what it has cost."""
        self.reserved = self.reserved.plus(at_most, times=-1)
        self.spent = self.spent.plus(actual)

    def reached(self, at_most: Expense) -> BudgetReached:
        """Return the error that says that a request doesn't fit."""
        budget, spent, open_ = self.budget, self.spent, self.reserved
        bounds = [f"{budget.tokens:,} tokens"] if budget.tokens is not None else []
        bounds += [f"${budget.dollars:,.2f}"] if budget.dollars is not None else []
        under_way = (
            f", {open_.tokens:,} tokens, ${open_.dollars:,.4f} under way" if open_.tokens else ""
        )
        return BudgetReached(
            f"the budget of {' and '.join(bounds)} is reached: {spent.tokens:,} tokens, "
            f"${spent.dollars:,.4f} spent by this job over all of its runs{under_way}, and the next request "
            f"can cost {at_most.tokens:,} tokens, ${at_most.dollars:,.4f}. Nothing is lost: raise "
            "writer.budget and run the job again to go on."
        )
