"""Sets with several kinds of questions: each kind by its own scorer."""

from __future__ import annotations

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring.choice import CHOICE
from gmai_xtuner.evaluate.scoring.closed import CLOSED
from gmai_xtuner.evaluate.scoring.overlap import EXACT_MATCH, TOKEN_F1, TOKEN_RECALL
from gmai_xtuner.evaluate.scoring.scorer import Scorer


def _mixed(name: str, description: str, open_scorer: Scorer) -> Scorer:
    def score(question: Question, answer: str) -> Score:
        for scorer in (CHOICE, CLOSED):
            if scorer.applies(question):
                return scorer.score(question, answer)
        return open_scorer.score(question, answer)

    return Scorer(name, 1, description, score, lambda _: True)


CLOSED_OR_RECALL = _mixed(
    "closed_or_recall",
    "choice or closed where the question is that, token recall otherwise",
    TOKEN_RECALL,
)
CLOSED_OR_F1 = _mixed(
    "closed_or_f1", "choice or closed where the question is that, token F1 otherwise", TOKEN_F1
)
CLOSED_OR_EXACT = _mixed(
    "closed_or_exact",
    "choice or closed where the question is that, exact match otherwise",
    EXACT_MATCH,
)
