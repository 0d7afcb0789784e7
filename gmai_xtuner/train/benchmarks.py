# SPDX-License-Identifier: Apache-2.0

"""Benchmarks in training and ``xtuner test``: a dataset, a loop and a metric over the evaluation's runner.

Reading, asking, prompts and scores are those of ``python -m gmai_xtuner.evaluate``; only who answers differs:
the model in training, whose ranks must generate in step, and whose answers are kept in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.dist import get_dist_info, is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.registry import DATASETS, LOOPS, METRICS
from mmengine.runner.base_loop import BaseLoop

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.config import dataset_config
from gmai_xtuner.core.errors import GMAIError, ImageError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.data.tokenization import ChatTemplate
from gmai_xtuner.evaluate.answerers import World
from gmai_xtuner.evaluate.answerers.local import read_ahead
from gmai_xtuner.evaluate.benchmarks import NAMES, find_benchmarks, is_own
from gmai_xtuner.evaluate.protocols import Asked, Average
from gmai_xtuner.evaluate.questions import Question
from gmai_xtuner.evaluate.results import Scored, average_of, score_all
from gmai_xtuner.evaluate.runner import Options, Target, answer_all, prepare
from gmai_xtuner.evaluate.store import Answer, Given, Job, sorted_jobs
from gmai_xtuner.generate import Answered, Predictor, Prompt, user_turn

OPTIONS = ("benchmark", "data", "variant", "protocol", "limit", "max_new_tokens")


@DATASETS.register_module()
class BenchmarkQuestions:
    """The questions of one or several benchmarks; ``asked`` has them by the name that their numbers get.

    Args:
        benchmarks: a folder, for every benchmark in it by its default protocol; or name -> options:
            ``data`` (folder or file), and ``benchmark`` (default: the name), ``variant``, ``protocol``,
            ``limit``, ``max_new_tokens``.
        limit: questions of each at the most; default: all.

    Raises:
        GMAIError: an unknown option, nothing to ask, or a benchmark that can't be read.
    """

    def __init__(
        self, benchmarks: str | Mapping[str, Mapping[str, Any]], limit: int | None = None
    ) -> None:
        self.asked = {
            name: _prepare(name, options, limit)
            for name, options in _benchmarks(benchmarks).items()
        }

    def __len__(self) -> int:
        return sum(len(asked.questions) for asked in self.asked.values())

    def numbers(self) -> set[str]:
        """Return every name, without prefix, that :class:`BenchmarkScore` may give a number of these."""
        return {
            f"{name}/{key}"
            for name, asked in self.asked.items()
            for key in (
                "accuracy",
                "unparsed",
                "unanswered",
                *map(_key, asked.protocol.averages[1:]),
            )
        }


def _key(average: Average) -> str:
    return average.name.replace(" ", "_")


def _benchmarks(
    benchmarks: str | Mapping[str, Mapping[str, Any]],
) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(benchmarks, Mapping) and benchmarks:
        return benchmarks
    if isinstance(benchmarks, Mapping) or not Path(benchmarks).is_dir():
        raise GMAIError(
            f"no folder of benchmarks at {benchmarks!r}: name it in the environment variable "
            "GMAI_BENCHMARKS, or with --cfg-options test_dataloader.dataset.benchmarks=FOLDER; or give "
            "name -> dict(data=...)"
        )
    found = find_benchmarks(Path(benchmarks))
    if not found:
        raise GMAIError(f"no benchmark lies under {benchmarks!r}. Known are {', '.join(NAMES)}")
    return {
        f"{Path(one.name).stem}_{one.variant}": {
            "benchmark": one.name,
            "data": one.data,
            "variant": one.variant,
        }
        for one in found
    }


def _prepare(name: str, options: Mapping[str, Any], limit: int | None) -> Asked:
    benchmark, data = options.get("benchmark", name), options.get("data")
    if set(options) - set(OPTIONS) or (data is None and not is_own(benchmark)):
        raise GMAIError(
            f"benchmark {name!r} takes {', '.join(OPTIONS)} and needs data, got {dict(options)}"
        )
    limits = [number for number in (limit, options.get("limit")) if number is not None]
    protocol = options.get("protocol")
    prepared = prepare(
        Target(benchmark, None if data is None else Path(data), options.get("variant")),
        Options(
            Path(),
            (protocol,) if protocol else (),
            limit=min(limits, default=None),
            max_new_tokens=options.get("max_new_tokens"),
        ),
        rank=get_dist_info()[0],
    )
    (asked,) = prepared.asked
    info(
        f"Benchmark {name}: {len(asked.questions)} of {asked.selected} questions of the protocol "
        f"{asked.name}"
    )
    return asked


class BenchmarkAnswers(NamedTuple):
    """What one benchmark came to, on every rank."""

    name: str
    asked: Asked
    scored: list[Scored]
    missing: list[tuple[Question, Answer | None]]


@METRICS.register_module()
class BenchmarkScore(BaseMetric):
    """Scores of the protocols.

    ``<benchmark>/accuracy`` is the protocol's headline average, ``<benchmark>/unparsed`` the share of
    answers that the scorer did not understand, ``<benchmark>/unanswered`` how many questions have no answer,
    since it was cut or empty or they could not be asked (only where there are any); further averages have
    their names. Prefixed by ``test`` or ``val``.

    Args:
        prefix: of the names; default ``test``.
        save: folder for ``<benchmark>.jsonl``: each answer, its score and how it ended; default: nothing is
            written.
    """

    default_prefix = "test"

    def __init__(self, prefix: str | None = None, save: str | None = None) -> None:
        super().__init__(prefix=prefix)
        self.save = save

    def process(self, data_batch: Any, data_samples: Sequence[BenchmarkAnswers]) -> None:
        self.results += data_samples

    def evaluate(self, size: int) -> dict[str, float]:
        """Return the numbers; every rank has all answers already."""
        metrics = self.compute_metrics(self.results)
        self.results.clear()
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}

    def compute_metrics(self, results: list[BenchmarkAnswers]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, asked, scored, missing in results:
            headline, *others = ((one, average_of(scored, one)) for one in asked.protocol.averages)
            found: dict[str, float | None] = {
                "accuracy": headline[1].value,
                **{_key(one): cell.value for one, cell in others},
                "unparsed": headline[1].unparsed,
                "unanswered": float(len(missing)) or None,
            }
            metrics |= {f"{name}/{key}": one for key, one in found.items() if one is not None}
            if self.save is not None and is_main_process():
                _write(Path(self.save) / f"{name}.jsonl", scored, missing)
        return metrics


def _write(
    file: Path, scored: Sequence[Scored], missing: Sequence[tuple[Question, Answer | None]]
) -> None:
    """Write what was scored, then what has no answer, whose ``value`` is null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    asked = [(one.question, one.answer, asdict(one.score)) for one in scored]
    asked += [(question, answer, {"value": None}) for question, answer in missing if answer]
    lines = [
        {"id": question.id, "gold": question.answer, **score}
        | {"prompt": answer.prompt, "answer": answer.answer, "ended": answer.ended}
        for question, answer, score in asked
    ]
    replace_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


_IN_STEP = Prompt((user_turn("?", 0),))
"""Asked in the place of what can't be asked, and not counted."""


def answers_in_step(
    predictor: Predictor, prompts: Sequence[Prompt | None], *, max_new_tokens: int, synced: bool
) -> list[Answered | None]:
    """Return greedy answers of all ranks together: under ZeRO-3 each holds a part of the weights.

    There are equally many prompts on every rank; None stands for one that only keeps the rank in step. An
    answer is None for what can't be asked: a rank that raised alone would leave the others waiting.
    """

    def fits(prompt: Prompt) -> bool:
        with suppress(ValueError):
            return predictor.num_tokens(prompt) < predictor.context_length
        return False

    own = [prompt if prompt and fits(prompt) else None for prompt in prompts]
    filled = [prompt or _IN_STEP for prompt in own]
    found = predictor.answer_batch(filled, max_new_tokens=max_new_tokens, synced_gpus=synced)
    return [answer if prompt else None for prompt, answer in zip(own, found, strict=True)]


class RankedAnswerer:
    """Asks the model in training; every rank asks equally often, in batches of equal sizes.

    Under ZeRO-3 all ranks must generate as often. Where the questions don't come out even, some are asked
    twice, and count once. ``readers`` are threads that read images, those of the next batch meanwhile.
    """

    name = model = "model in training"
    repeats = True
    generation: Mapping[str, Any] = {"decoding": "greedy"}

    def __init__(self, predictor: Predictor, *, batch_size: int, readers: int) -> None:
        self.predictor, self.batch_size, self.readers = predictor, batch_size, max(1, readers)

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        mine = jobs_in_step(jobs, rank, world_size)
        batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        for batch, images in read_ahead(batches, readers=self.readers):
            prompts = [
                None
                if isinstance(own, ImageError)
                else Prompt((user_turn(job.prompt, len(own)),), tuple(own))
                for job, own in zip(batch, images, strict=True)
            ]
            length, synced = batch[0].max_new_tokens, world_size > 1
            answered = answers_in_step(
                self.predictor, prompts, max_new_tokens=length, synced=synced
            )
            for own in images:
                if isinstance(own, ImageError):
                    warn(str(own))
            yield [
                Given(job, one.text, ended="length" if one.is_cut else "stop")
                if one is not None
                else Given(job, None, problem="cannot_be_asked")
                for job, one in zip(batch, answered, strict=True)
            ]


def jobs_in_step(jobs: Sequence[Job], rank: int, world_size: int) -> list[Job]:
    """Return a rank's share of the jobs, the longest first; the shares of all ranks are equally long."""
    ordered = sorted_jobs(jobs)
    again = (ordered * world_size)[: -len(ordered) % world_size]
    return [*ordered, *again][rank::world_size]


def ask_benchmarks(
    questions: BenchmarkQuestions,
    evaluator: Evaluator,
    predictor: Predictor,
    *,
    batch_size: int,
    readers: int,
) -> dict[str, float]:
    """Ask all questions and score the answers; all ranks take part. See :class:`RankedAnswerer`."""
    answerer = RankedAnswerer(predictor, batch_size=batch_size, readers=readers)
    rank, size = get_dist_info()
    for name, asked in questions.asked.items():
        jobs = (job for _, job in asked.jobs())
        answers, _ = answer_all(jobs, answerer, world=World(rank, size=size))
        scored, missing = score_all(asked, answers)
        reasons = Counter(answer.problem if answer else "cannot_be_asked" for _, answer in missing)
        if reasons:
            counted = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
            warn(f"Benchmark {name}: no answer to {counted}")
        evaluator.process(data_samples=[BenchmarkAnswers(name, asked, scored, missing)])
    return evaluator.evaluate(len(questions))


def bare_model(model: Any) -> GMAILLaVAModel:
    """Return the model within what DeepSpeed or DDP have put around it."""
    while not isinstance(model, GMAILLaVAModel):
        model = model.module
    return model


def predictor_of(model: GMAILLaVAModel, data: SoftPackedDataset) -> Predictor:
    """Return a model in training as one that is asked, with the tokenizer and images of its data."""
    parts = {"tokenizer": data.tokenizer, "template": data.template, "transform": data.transform}
    return Predictor(model, **parts)


@LOOPS.register_module()
class BenchmarkLoop(BaseLoop):
    """The loop of ``xtuner test``: benchmarks, asked as the model was trained.

    Tokenizer, template and image path are those of ``train_dataloader.dataset`` in the config. ``dataloader``
    has ``dataset=dict(type="BenchmarkQuestions", ...)``, ``batch_size`` and ``num_workers``.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: dict[str, Any],
        evaluator: Evaluator | dict[str, Any] | list[Any],
    ) -> None:
        super().__init__(runner, DATASETS.build(dataloader["dataset"]))
        self._asking = {
            "batch_size": dataloader["batch_size"],
            "readers": dataloader.get("num_workers", 0),
        }
        self.evaluator = (
            evaluator if isinstance(evaluator, Evaluator) else runner.build_evaluator(evaluator)
        )

    def run(self) -> dict[str, float]:
        from xtuner.registry import BUILDER

        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        self.runner.model.eval()
        data = dataset_config(self.runner.cfg)
        template, add_bos = data.get("prompt_template", "internlm2_chat"), data.get("add_bos", True)
        mode = data.get("image_mode", "pad")
        predictor = Predictor(
            bare_model(self.runner.model),
            tokenizer=BUILDER.build(data["tokenizer"]),
            template=ChatTemplate.from_xtuner(template, add_bos=add_bos),
            transform=ImageTransform.from_pretrained(data["vision"], mode=mode),
        )
        metrics = ask_benchmarks(self.dataloader, self.evaluator, predictor, **self._asking)
        self.runner.call_hook("after_test_epoch", metrics=metrics)
        self.runner.call_hook("after_test")
        return metrics
