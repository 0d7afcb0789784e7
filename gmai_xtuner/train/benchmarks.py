"""Benchmarks in mmengine's terms: questions as a dataset, the protocols' scores as a metric, and a loop.

``xtuner test CONFIG --checkpoint CHECKPOINT`` and the validation of a training run ask with them;
reading, prompts and scores are those of ``python -m gmai_xtuner.evaluate``.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_dist_info, is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, DATASETS, LOOPS, METRICS
from mmengine.runner import TestLoop
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from gmai_xtuner.core.config import dataset_config
from gmai_xtuner.core.errors import GMAIError, ImageError
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.tokenization import ChatTemplate
from gmai_xtuner.evaluate.answerers.answerer import open_picture
from gmai_xtuner.evaluate.benchmarks import NAMES, find_benchmarks, load_benchmark
from gmai_xtuner.evaluate.protocols import Protocol, protocol
from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.results import Scored, average_name, average_of
from gmai_xtuner.evaluate.store import Answer
from gmai_xtuner.generate import GREEDY, Predictor, Prompt, user_turn
from gmai_xtuner.model.llava import GMAILLaVAModel

OPTIONS = ("benchmark", "data", "variant", "protocol", "limit")


@dataclass(frozen=True)
class Entry:
    """A benchmark that is asked, under the name that its numbers get."""

    name: str
    protocol: Protocol
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """An item of the dataset.

    Args:
        entry: number of the benchmark.
        number: of the question in it.
        prompt: what is asked; None if a picture can't be read.
    """

    entry: int
    number: int
    prompt: Prompt | None


@DATASETS.register_module()
class BenchmarkQuestions(Dataset):
    """The questions of one or several benchmarks.

    Args:
        benchmarks: a folder, for every benchmark in it by its default protocol; or name -> options:
            ``data`` (folder or file), and ``benchmark`` (default: the name), ``variant``, ``protocol``,
            ``limit``.
        limit: questions of each at the most; default: all.

    Raises:
        GMAIError: an unknown option, nothing to ask, or a benchmark that can't be read.
    """

    def __init__(
        self, benchmarks: str | Mapping[str, Mapping[str, Any]], limit: int | None = None
    ) -> None:
        self.entries = [
            _entry(name, options, limit) for name, options in _specified(benchmarks).items()
        ]
        self.rows = [
            (entry, number)
            for entry, one in enumerate(self.entries)
            for number in range(len(one.questions))
        ]
        self.metainfo = {"benchmarks": self.entries}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AskedQuestion:
        entry, number = self.rows[index]
        one = self.entries[entry]
        question = one.questions[number]
        try:
            pictures: list[Image.Image] = [
                open_picture(source, f"image of question {question.id}")
                for source in question.images
            ]
        except ImageError as error:
            print_log(f"{one.name}, question {question.id}: {error}", "current", logging.WARNING)
            return AskedQuestion(entry, number, None)
        turn = user_turn(one.protocol.prompt(question), len(pictures))
        return AskedQuestion(entry, number, Prompt((turn,), tuple(pictures)))


def _specified(
    benchmarks: str | Mapping[str, Mapping[str, Any]],
) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(benchmarks, Mapping):
        if not benchmarks:
            raise GMAIError(
                "no benchmark is named: give name -> dict(data=...), or a folder of them"
            )
        return benchmarks
    if not Path(benchmarks).is_dir():
        raise GMAIError(
            f"no folder of benchmarks at {benchmarks!r}: name it in the environment variable "
            "GMAI_BENCHMARKS, or with --cfg-options test_dataloader.dataset.benchmarks=FOLDER"
        )
    found = find_benchmarks(Path(benchmarks))
    if not found:
        raise GMAIError(f"no benchmark lies under {benchmarks!r}. Known are {', '.join(NAMES)}")
    return {
        f"{one.name}_{one.variant}": {
            "benchmark": one.name,
            "data": str(one.data),
            "variant": one.variant,
        }
        for one in found
    }


def _entry(name: str, options: Mapping[str, Any], limit: int | None) -> Entry:
    unknown = set(options) - set(OPTIONS)
    if unknown or "data" not in options:
        raise GMAIError(
            f"benchmark {name!r} takes {', '.join(OPTIONS)} and needs data, got {dict(options)}"
        )
    benchmark = load_benchmark(
        options.get("benchmark", name), Path(options["data"]), variant=options.get("variant")
    )
    chosen = protocol(benchmark.name, options.get("protocol"), variant=benchmark.variant)
    selected = chosen.select(benchmark.questions)
    if not selected:
        raise GMAIError(f"benchmark {name!r} has no question for the protocol {chosen.name!r}")
    limits = [number for number in (limit, options.get("limit")) if number is not None]
    questions = selected[: min(limits)] if limits else selected
    told = f", {dict(benchmark.counted_problems())}" if benchmark.problems else ""
    print_log(
        f"Benchmark {name}: {len(questions)} of {len(selected)} questions of the protocol "
        f"{chosen.name}/{chosen.version}{told}",
        logger="current",
        level=logging.WARNING if benchmark.problems else logging.INFO,
    )
    return Entry(name, chosen, questions)


@DATA_SAMPLERS.register_module()
class QuestionBatches:
    """Batches of one benchmark each; every rank has equally many, of equal sizes.

    Under ZeRO-3 all ranks must ask as often. Where the questions don't come out even, some are asked
    twice; the metric counts each once.

    Args:
        sampler: mmengine's; its dataset is a :class:`BenchmarkQuestions`.
        batch_size: questions that a rank asks together.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.dataset: BenchmarkQuestions = sampler.dataset
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        rank, world_size = get_dist_info()
        for indices in self._by_entry():
            again = (indices * world_size)[: -len(indices) % world_size]
            mine = [*indices, *again][rank::world_size]
            for start in range(0, len(mine), self.batch_size):
                yield mine[start : start + self.batch_size]

    def __len__(self) -> int:
        _, world_size = get_dist_info()
        of_a_rank = [math.ceil(len(indices) / world_size) for indices in self._by_entry()]
        return sum(math.ceil(number / self.batch_size) for number in of_a_rank)

    def _by_entry(self) -> list[list[int]]:
        """Indices of each benchmark, the longest questions first."""
        parts: list[list[int]] = [[] for _ in self.dataset.entries]
        for index, (entry, _) in enumerate(self.dataset.rows):
            parts[entry].append(index)

        def length(index: int) -> tuple[int, int]:
            entry, number = self.dataset.rows[index]
            question = self.dataset.entries[entry].questions[number]
            return -len(question.images), -len(question.text) - sum(map(len, question.options))

        return [sorted(part, key=length) for part in parts]


@METRICS.register_module()
class BenchmarkScore(BaseMetric):
    """Scores of the protocols, of all ranks together.

    ``<benchmark>/accuracy`` is the protocol's headline average, ``<benchmark>/unparsed`` the share of
    answers that the scorer did not understand, ``<benchmark>/unanswered`` how many questions could not
    be asked (only where there are any); further averages have their names. Prefixed by ``test`` or ``val``.

    Args:
        prefix: of the names; default ``test``.
        save: folder for ``<benchmark>.jsonl`` with each answer and score; default: nothing is written.
    """

    default_prefix = "test"

    def __init__(self, prefix: str | None = None, save: str | None = None) -> None:
        super().__init__(prefix=prefix)
        self.save = save

    def process(
        self, data_batch: Sequence[AskedQuestion], data_samples: Sequence[str | None]
    ) -> None:
        entries: list[Entry] = (self.dataset_meta or {})["benchmarks"]
        for asked, text in zip(data_batch, data_samples, strict=True):
            entry = entries[asked.entry]
            question = entry.questions[asked.number]
            score = None if text is None else entry.protocol.score(question, text)
            self.results.append((asked.entry, asked.number, text, score))

    def evaluate(self, size: int) -> dict[str, float]:
        """The numbers over all ranks; a question that was asked twice counts once."""
        answers: dict[tuple[int, int], tuple[str | None, Score | None]] = {}
        for part in all_gather_object(self.results):
            for entry, number, text, score in part:
                answers.setdefault((entry, number), (text, score))
        self.results.clear()
        metrics = self.compute_metrics([answers])
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        (answers,) = results
        metrics: dict[str, float] = {}
        for place, entry in enumerate((self.dataset_meta or {})["benchmarks"]):
            scored, unanswered = [], 0
            for number, question in enumerate(entry.questions):
                text, score = answers.get((place, number), (None, None))
                if text is None or score is None:
                    unanswered += 1
                    continue
                scored.append(Scored(question, _answer(entry, question, text), score))
            metrics |= _numbers(entry, scored, unanswered)
            if self.save is not None and is_main_process():
                _write(Path(self.save) / f"{entry.name}.jsonl", scored)
        return metrics


def _answer(entry: Entry, question: Question, text: str) -> Answer:
    chosen = entry.protocol
    return Answer(
        question.id,
        chosen.prompt(question),
        text,
        0.0,
        "",
        f"{chosen.name}/{chosen.version}",
        {"max_new_tokens": chosen.max_new_tokens},
    )


def _numbers(entry: Entry, scored: Sequence[Scored], unanswered: int) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for place, average in enumerate(entry.protocol.averages):
        cell = average_of(scored, average)
        name = "accuracy" if place == 0 else average_name(average).replace(" ", "_")
        if cell.value is not None:
            numbers[f"{entry.name}/{name}"] = cell.value
        if place == 0:
            numbers[f"{entry.name}/unparsed"] = cell.unparsed
    if unanswered:
        numbers[f"{entry.name}/unanswered"] = float(unanswered)
    return numbers


def _write(file: Path, scored: Sequence[Scored]) -> None:
    from gmai_xtuner.core.files import replace_text

    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"id": one.question.id, "gold": one.question.answer, **asdict(one.score)}
        | {"prompt": one.answer.prompt, "answer": one.answer.answer}
        for one in scored
    ]
    replace_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


_IN_STEP = Prompt((user_turn("?", 0),))
"""Asked in the place of what can't be asked, and not counted."""


class RankedPredictor(Predictor):
    """Answers of all ranks together: under ZeRO-3 each holds a part of the weights."""

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[Prompt | None], *, max_new_tokens: int, synced: bool
    ) -> list[str | None]:
        """Greedy answers; None for what can't be asked.

        Args:
            prompts: equally many on every rank; None stands for one that only keeps the rank in step.
            max_new_tokens: the longest answer.
            synced: every rank runs as many passes as the longest of them.
        """
        filled = [prompt or _IN_STEP for prompt in prompts]
        encoded = [self.encode(prompt) for prompt in filled]
        too_long = [self._length(ids) >= self.context_length for ids in encoded]
        # A rank that raised alone would leave the others waiting.
        for number in (number for number, long in enumerate(too_long) if long):
            filled[number], encoded[number] = _IN_STEP, self.encode(_IN_STEP)
        embeds = self._embed_all(encoded, [prompt.images for prompt in filled])
        groups = list(self._by_room(embeds, max_new_tokens).items())
        if synced:
            # Ranks generate equally often; one with fewer groups makes a token that nobody reads.
            most = max(all_gather_object(len(groups)))
            groups += [(1, [])] * (most - len(groups))
        answers: list[str | None] = [None] * len(prompts)
        for room, numbers in groups:
            rows = [embeds[number] for number in numbers] or embeds[:1]
            output = self.model.llm.generate(
                **self._padded(rows, room), **GREEDY.arguments(), synced_gpus=synced
            )
            for number, ids in zip(numbers, output, strict=False):
                if prompts[number] is not None and not too_long[number]:
                    answers[number] = self._decode(ids)
        return answers


def ask(
    dataloader: DataLoader, predictor: RankedPredictor, evaluator: Evaluator
) -> dict[str, float]:
    """Ask all questions and score the answers; all ranks take part."""
    questions: BenchmarkQuestions = dataloader.dataset  # type: ignore[assignment]
    _, world_size = get_dist_info()
    for batch in dataloader:
        answers = predictor.answers(
            [asked.prompt for asked in batch],
            max_new_tokens=questions.entries[batch[0].entry].protocol.max_new_tokens,
            synced=world_size > 1,
        )
        evaluator.process(data_samples=answers, data_batch=batch)
    return evaluator.evaluate(len(questions))


def as_list(batch: list[AskedQuestion]) -> list[AskedQuestion]:
    """Collates questions: they stay what they are."""
    return batch


def question_loader(
    build: Any,
    dataset: BenchmarkQuestions | Mapping[str, Any],
    *,
    batch_size: int,
    num_workers: int,
) -> DataLoader:
    """A loader of questions for all ranks.

    Args:
        build: the runner's ``build_dataloader``.
        dataset: the questions, or what they are built from.
        batch_size: questions that a rank asks together.
        num_workers: processes that read pictures.
    """
    return build(
        {
            "dataset": dataset,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "batch_sampler": {"type": "QuestionBatches"},
            "collate_fn": {"type": as_list},
        }
    )


def bare_model(model: Any) -> GMAILLaVAModel:
    """The model within what DeepSpeed or DDP have put around it."""
    while not isinstance(model, GMAILLaVAModel):
        model = model.module
    return model


@LOOPS.register_module()
class BenchmarkLoop(TestLoop):
    """What ``xtuner test`` runs: benchmarks, asked as the model was trained.

    Tokenizer, template and image path are those of ``train_dataloader.dataset`` in the config.

    Args:
        runner: mmengine's.
        dataloader: ``dataset=dict(type="BenchmarkQuestions", ...)``, ``batch_size``, ``num_workers``.
        evaluator: with :class:`BenchmarkScore`.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: dict[str, Any],
        evaluator: Evaluator | dict[str, Any] | list[Any],
    ) -> None:
        loader = question_loader(
            runner.build_dataloader,
            dataloader["dataset"],
            batch_size=dataloader["batch_size"],
            num_workers=dataloader.get("num_workers", 0),
        )
        super().__init__(runner, loader, evaluator)

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        self.runner.model.eval()
        metrics = ask(self.dataloader, self._predictor(), self.evaluator)
        self.runner.call_hook("after_test_epoch", metrics=metrics)
        self.runner.call_hook("after_test")
        return metrics

    def _predictor(self) -> RankedPredictor:
        from xtuner.registry import BUILDER

        data = dataset_config(self.runner.cfg)
        return RankedPredictor(
            bare_model(self.runner.model),
            tokenizer=BUILDER.build(data["tokenizer"]),
            template=ChatTemplate.from_xtuner(
                data.get("prompt_template", "internlm2_chat"), add_bos=data.get("add_bos", True)
            ),
            transform=ImageTransform.from_pretrained(
                data["vision"], mode=data.get("image_mode", "pad")
            ),
        )
