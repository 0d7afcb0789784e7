# SPDX-License-Identifier: Apache-2.0

"""Who answers: an export of ours, any transformers image-text model, any endpoint, or stored answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from gmai_xtuner.evaluate.store import Given, Job


class Answerer(Protocol):
    """Something that answers.

    Attributes:
        model: its hash.
        generation: what decides an answer besides prompt and ``max_new_tokens``.
        repeats: the same question has the same answer always: what was cut need not be asked again.
    """

    name: str
    model: str
    generation: Mapping[str, Any]
    repeats: bool

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        """Yield answers as they come, in any order, each once; of this process's share of the jobs.

        Raises:
            EvaluationError: it can't go on; what was yielded before stands.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it runs: the command's options of the same names.

    Args:
        model: folder or hub name; of an endpoint the model's name there.
        loader: ``auto`` looks for what our exports have.
        dtype: torch's name; None: bf16 on a GPU, fp32 on the CPU.
        api_key_env: name of the environment variable that holds the endpoint's key; None: ``OPENAI_API_KEY``,
            if it is set.
        moved_from: address that the endpoint had when its stored answers were given.
        timeout: seconds that an answer may take.
        temperature: sent to the server; None: not sent, for models that refuse it.
        answers: files of answers that another kit has stored; then ``model`` is a name alone.
        answer_columns: their columns of the question's id and of the answer; None: those of a known kit.
        logprobs: ask the server how likely the first tokens were, where an answer has labels.
    """

    model: str
    name: str | None = None
    loader: Literal["auto", "ours", "transformers"] = "auto"
    llm: str | None = None
    vision: str | None = None
    dtype: str | None = None
    device: str | None = None
    batch_size: int = 16
    endpoint: str | None = None
    api_key_env: str | None = None
    moved_from: str | None = None
    in_flight: int = 16
    retries: int = 6
    timeout: float = 300.0
    temperature: float | None = 0.0
    answers: tuple[str, ...] = ()
    answer_columns: tuple[str, str] | None = None
    logprobs: bool = False

    @property
    def shown(self) -> str:
        """The name in tables."""
        return self.name or Path(self.model.rstrip("/")).name or self.model


def make_answerer(options: ModelOptions, *, cache: Path, local_rank: int = 0) -> Answerer:
    """Load the model, or get ready to ask the endpoint.

    Args:
        cache: folder where hashes of weights are remembered.
        local_rank: this process's GPU.

    Raises:
        GMAIError: it can't be loaded; says why.
    """
    if options.answers:
        from gmai_xtuner.evaluate.answerers.stored import StoredAnswers

        return StoredAnswers(options)
    if options.endpoint is not None:
        from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer

        return EndpointAnswerer(options)
    import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
    from gmai_xtuner.evaluate.answerers.local import load_local

    return load_local(options, cache=cache, local_rank=local_rank)
