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

from gmai_xtuner.engine.on_disk import replace_text
from gmai_xtuner.errors import EvaluationError
from gmai_xtuner.evaluation.answerers import Answerer
from gmai_xtuner.evaluation.benchmarks import (
    Benchmark,
    BenchmarkError,
    load_benchmark,
    write_submission,
)
from gmai_xtuner.evaluation.judge import judge_answers, judge_name
from gmai_xtuner.evaluation.protocols import PROTOCOLS, Protocol, protocol
from gmai_xtuner.evaluation.report import SHOWN, write_report
from gmai_xtuner.evaluation.results import Result, Scored, score_all, summarise, write_result
from gmai_xtuner.evaluation.run import (
    Asked,
    World,
    answer_all,
    ask_for,
    counted,
    identity_of,
    source_of,
    store_folder,
)
from gmai_xtuner.evaluation.store import AnswerStore, read_identity
from gmai_xtuner.evaluation.tables import (
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
        judge: judges what rules leave open, see :mod:`gmai_xtuner.evaluation.judge`.

    Returns:
        a result for each protocol and scorer; none in other processes than the first.

    Raises:
        GMAIError: the benchmark can't be read, asked or scored.
    """
    benchmark = load_benchmark(
        target.name, target.data, variant=target.variant, require_images=answerer is not None
    )
    if benchmark.problems and world.rank == 0:
        first = benchmark.problems[0]
        log.warning(
            "%s (%s): %s; the first is %s: %s",
            benchmark.name,
            benchmark.variant,
            dict(benchmark.counted_problems()),
            first.record,
            first.detail,
        )
    asked = [ask_for(benchmark, one, limit=options.limit) for one in _protocols(benchmark, options)]
    folder = store_folder(options.out, benchmark.name, benchmark.variant)
    if answerer is not None:
        store = AnswerStore(folder, identity_of(benchmark, answerer))
        failed = answer_all(asked, answerer, store, world=world)
    else:
        store, failed = _stored(folder, benchmark), {}
    results = []
    if world.rank == 0:
        reasons = {name: one.problem for name, one in failed.items()}
        if failed:
            given = next(iter(failed.values()))
            log.warning(
                "%s: %s; the first is question %s: %s",
                benchmark.name,
                counted(failed),
                given.job.id,
                given.detail,
            )
        for part in asked:
            results += list(_score(part, benchmark, store, reasons, options, judge))
    world.barrier()
    return results


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
            + (f"; its answers were asked by {dict(prompts)}" if prompts else "")
            + (f". Nothing was answered: {dict(Counter(reasons.values()))}" if reasons else "")
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
        )
        name = asked.protocol.name if scorer == own else f"{asked.protocol.name}.{scorer}"
        _write(store.folder / _file_name(name), made, scored, options)
        return made

    if (benchmark.name, benchmark.variant) == ("gmai_mmbench", "test"):
        _submit(store, benchmark, scored)
    yield result(own, scored)
    others = asked.protocol.also if ALL in options.scorers else options.scorers
    for scorer in dict.fromkeys(others):
        if scorer != own:
            yield result(scorer, _scored_by(scorer, asked, scored))
    if judge is not None:
        judged = judge_answers(scored, judge, cache=options.out / f"judge-{_file_name(judge.name)}")
        log.warning(
            "%s: the judge was asked about %d answers, %d of its replies are no verdict",
            asked.name,
            judged.asked,
            judged.unclear,
        )
        yield result(f"{own}+{judge_name(judge)}", judged.scored)


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
