"""One model and some benchmarks, from files to a folder of results.

```
OUT/<benchmark>-<variant>/answers-*.jsonl, run.json       every raw answer
OUT/<benchmark>-<variant>/<protocol>[.<scorer>]/          result.json, scores.jsonl, tables.*, report.html
OUT/tables.md, .csv, .tex                                 all results, in the shape of the paper's tables too
```
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.evaluate.answerers import Answerer, Given
from gmai_xtuner.evaluate.benchmarks import (
    Benchmark,
    BenchmarkError,
    load_benchmark,
    write_submission,
)
from gmai_xtuner.evaluate.judge import PROMPT_VERSION, judge_answers, judge_name
from gmai_xtuner.evaluate.protocols import PROTOCOLS, Protocol, protocol
from gmai_xtuner.evaluate.report import SHOWN, write_report
from gmai_xtuner.evaluate.results import Result, Scored, score_all, summarise, write_result
from gmai_xtuner.evaluate.run import (
    Asked,
    World,
    answer_all,
    ask_for,
    counted,
    identity_of,
    source_of,
    store_folder,
)
from gmai_xtuner.evaluate.store import AnswerStore, read_identity
from gmai_xtuner.evaluate.tables import (
    Table,
    group_tables,
    summary_table,
    tables_like_the_papers,
    to_csv,
    to_latex,
    to_markdown,
)

log = logging.getLogger(__name__)
ALL = "all"


@dataclass(frozen=True, slots=True)
class Target:
    """A benchmark and where its files are."""

    name: str
    data: Path
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How benchmarks are asked and scored.

    Args:
        out: folder of answers and results.
        protocols: names; none: the default of each variant; ``all``: every one of the variant.
        scorers: further scorers of the same answers; ``all``: those that the protocol names.
        limit: questions of each protocol at the most; None for all.
        report_questions: questions on each page; 0: no page.
    """

    out: Path
    protocols: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    limit: int | None = None
    report_questions: int = SHOWN


@dataclass(frozen=True)
class Prepared:
    """A benchmark that has been read, and what is to be asked of it."""

    benchmark: Benchmark
    asked: tuple[Asked, ...]


def prepare(
    target: Target, options: Options, *, require_images: bool, world: World | None = None
) -> Prepared:
    """Read a benchmark and find out, before anything is asked, whether it can be asked and scored so.

    Args:
        target: the benchmark.
        options: protocols, scorers and limit.
        require_images: leave questions out whose image is missing.
        world: this process among the others; the first tells what is left out.

    Raises:
        GMAIError: the benchmark can't be read, or has no such protocol or scorer; the same in all processes.
    """
    benchmark = load_benchmark(
        target.name, target.data, variant=target.variant, require_images=require_images
    )
    if benchmark.problems and (world is None or world.rank == 0):
        first = benchmark.problems[0]
        log.warning(
            "%s (%s): %s; the first is %s: %s",
            benchmark.name,
            benchmark.variant,
            _told(benchmark.counted_problems()),
            first.record,
            first.detail,
        )
    asked = tuple(
        ask_for(benchmark, one, limit=options.limit) for one in _protocols(benchmark, options)
    )
    for part in asked:
        for scorer in _other_scorers(part.protocol, options):
            part.protocol.check_scorer(scorer, part.questions)
    return Prepared(benchmark, asked)


def ask_and_score(
    target: Target,
    answerer: Answerer | None,
    options: Options,
    *,
    world: World,
    judge: Answerer | None = None,
) -> list[Result]:
    """Ask one benchmark and score it.

    Args:
        target: the benchmark.
        answerer: who is asked; None: stored answers are scored, nothing is asked.
        options: how.
        world: this process among the others; the first scores and writes.
        judge: judges what rules leave open, see :mod:`gmai_xtuner.evaluate.judge`.

    Returns:
        a result for each protocol and scorer; none in other processes than the first.

    Raises:
        GMAIError: the benchmark can't be read, asked or scored.
    """
    prepared = prepare(target, options, require_images=answerer is not None, world=world)
    answers = ask(prepared, answerer, options, world=world)
    return score(prepared, answers, options, world=world, judge=judge)


@dataclass(frozen=True)
class Answers:
    """What a benchmark's questions were answered.

    Args:
        store: the answers.
        failed: questions that got none, by id.
    """

    store: AnswerStore
    failed: Mapping[str, Given]


def ask(
    prepared: Prepared, answerer: Answerer | None, options: Options, *, world: World
) -> Answers:
    """Ask what has no answer yet, all processes together.

    Raises:
        GMAIError: it can't go on. In one process alone, maybe: the others then wait for it.
    """
    benchmark = prepared.benchmark
    folder = store_folder(options.out, benchmark.name, benchmark.variant)
    if answerer is not None:
        store = AnswerStore(folder, identity_of(benchmark, answerer))
        return Answers(store, answer_all(prepared.asked, answerer, store, world=world))
    store = _stored(folder, benchmark)
    if world.rank == 0:
        log.warning(
            "%s (%s): the stored answers of %s (%s) are scored",
            benchmark.name,
            benchmark.variant,
            store.identity.model_name,
            store.identity.model,
        )
    return Answers(store, {})


def score(
    prepared: Prepared,
    answers: Answers,
    options: Options,
    *,
    world: World,
    judge: Answerer | None = None,
) -> list[Result]:
    """Score and write, in the first process; the others wait, also where it fails.

    Raises:
        GMAIError: it can't be scored; in the first process alone.
    """
    benchmark, failed, results = prepared.benchmark, answers.failed, []
    try:
        if world.rank == 0:
            reasons = {name: one.problem for name, one in failed.items()}
            if failed:
                given = next(iter(failed.values()))
                log.warning(
                    "%s: %s; the first is question %s: %s",
                    benchmark.name,
                    _told(counted(failed)),
                    given.job.id,
                    given.detail,
                )
            for part in prepared.asked:
                results += list(_score(part, benchmark, answers.store, reasons, options, judge))
    finally:
        world.barrier()
    return results


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _other_scorers(protocol: Protocol, options: Options) -> list[str]:
    """Scorers besides the protocol's own, each once."""
    others = protocol.also if ALL in options.scorers else options.scorers
    return [scorer for scorer in dict.fromkeys(others) if scorer != protocol.scorer]


def _protocols(benchmark: Benchmark, options: Options) -> list[Protocol]:
    if ALL in options.protocols:
        return [one for one in PROTOCOLS[benchmark.name] if one.variant == benchmark.variant]
    names: tuple[str | None, ...] = options.protocols or (None,)
    return [protocol(benchmark.name, name, variant=benchmark.variant) for name in names]


def _stored(folder: Path, benchmark: Benchmark) -> AnswerStore:
    identity = read_identity(folder)
    if identity is None:
        raise EvaluationError(
            f"no answers are stored in {folder}. Leave --score-only out to ask, or give the --out of a run"
        )
    return AnswerStore(folder, replace(identity, source=source_of(benchmark)))


def _score(
    asked: Asked,
    benchmark: Benchmark,
    store: AnswerStore,
    reasons: Mapping[str, str],
    options: Options,
    judge: Answerer | None,
) -> Iterator[Result]:
    own = asked.protocol.scorer
    answers = store.read()
    scored, missing = score_all(asked, answers)
    if not scored:
        prompts = Counter(answer.protocol for answer in answers.values())
        raise EvaluationError(
            f"{store.folder} has no answer to a prompt of the protocol {asked.name}"
            + (f"; it has answers to those of {_told(prompts)}" if prompts else "")
            + (f". Nothing was answered: {_told(Counter(reasons.values()))}" if reasons else "")
        )
    unanswered = Counter(reasons.get(question.id, "not_asked") for question in missing)
    left_out = Counter(problem.reason for problem in benchmark.problems if problem.left_out)

    def result(scorer: str, scored: Sequence[Scored]) -> Result:
        made = summarise(
            asked,
            scored,
            scorer=scorer,
            model_name=store.identity.model_name,
            model=store.identity.model,
            generation=store.identity.generation,
            left_out=left_out,
            unanswered=unanswered,
            source=store.identity.source,
        )
        name = asked.protocol.name if scorer == own else f"{asked.protocol.name}.{scorer}"
        _write(store.folder / _file_name(name), made, scored, options)
        return made

    if (benchmark.name, benchmark.variant) == ("gmai_mmbench", "test"):
        _submit(store, benchmark, scored)
    yield result(own, scored)
    for scorer in _other_scorers(asked.protocol, options):
        yield result(scorer, _scored_by(scorer, asked, scored))
    if judge is not None:
        judged = judge_answers(scored, judge, cache=options.out / _judge_folder(judge))
        log.warning(
            "%s: the judge was asked about %d answers, %d of its replies are no verdict",
            asked.name,
            judged.asked,
            judged.unclear,
        )
        yield result(f"{own}+{judge_name(judge)}", judged.scored)


def _judge_folder(judge: Answerer) -> str:
    return _file_name(f"judge-{judge.name}-{PROMPT_VERSION}")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)


def _submit(store: AnswerStore, benchmark: Benchmark, scored: Sequence[Scored]) -> None:
    """The file that the authors of GMAI-MMBench evaluate, once every question of TEST has an answer."""
    answers = {one.question.id: one.answer.answer for one in scored}
    try:
        file = write_submission(
            store.folder, store.identity.model_name, benchmark=benchmark, answers=answers
        )
    except BenchmarkError as error:
        log.warning("No submission file: %s", error)
    else:
        log.warning("To send to the authors of GMAI-MMBench: %s", file)


def _scored_by(scorer: str, asked: Asked, scored: Sequence[Scored]) -> list[Scored]:
    return [
        replace(one, score=asked.protocol.score(one.question, one.answer.answer, scorer=scorer))
        for one in scored
    ]


def _write(folder: Path, result: Result, scored: Sequence[Scored], options: Options) -> None:
    write_result(folder, result, scored)
    tables = [*tables_like_the_papers([result]), *group_tables(result)]
    write_tables(folder, [summary_table([result]), *tables])
    if options.report_questions:
        write_report(folder / "report.html", result, tables, scored, shown=options.report_questions)


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """``tables.md``, ``tables.csv`` and ``tables.tex``."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        ("md", to_markdown(tables)),
        ("csv", to_csv(tables)),
        ("tex", to_latex(tables)),
    ):
        replace_text(folder / f"tables.{suffix}", text)


def all_tables(results: Sequence[Result]) -> list[Table]:
    """The summary and the tables in the paper's shape, of all results of a run."""
    return [summary_table(results), *tables_like_the_papers(results)]
