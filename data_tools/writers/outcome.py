"""What goes into a writer and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_tools.items import Conversation, Item, Problem, SourceContext
from data_tools.records import Record
from gmai_xtuner.core.errors import CorpusError


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
        prompt: the last one in full, as text; a picture stands as its file's name.
        answer: the model's last, as it came.
        attempts: answers that were judged, from the server or from the ledger.
        prompt_tokens, completion_tokens, dollars: what this run spent on it; answers that the ledger had
            cost nothing.
        pending: True: the server's fault, the item isn't decided and belongs into the next run.
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


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the model, as the ledger keeps it.

    Args:
        text: of the first choice; empty if it has none.
        finish: the API's ``finish_reason``; ``"no choice"`` for an answer without choices.
        refusal: the API's own field for it.
        prompt_tokens, completion_tokens, dollars: as the server counted them.
        new: asked of the server by this run.
    """

    text: str
    finish: str = "stop"
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    new: bool = field(default=True, compare=False)


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
