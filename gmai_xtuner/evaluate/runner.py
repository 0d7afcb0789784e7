# SPDX-License-Identifier: Apache-2.0

"""Benchmarks and a model -> stored answers -> results; also in training, which keeps its answers in memory.

```
OUT/<benchmark>-<variant>/answers-*.jsonl, run.json       every raw answer
OUT/<benchmark>-<variant>/<protocol>[.<scorer>]/          result.json, scores.jsonl, tables.*, report.html
OUT/tables.md, .csv, .tex                                 all results, in the shape of the paper's tables too
```
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from gmai_xtuner.core.errors import EvaluationError, GMAIError
from gmai_xtuner.evaluate import judge as judging
from gmai_xtuner.evaluate.answerers import Answerer, World
from gmai_xtuner.evaluate.answerers.stored import StoredAnswers
from gmai_xtuner.evaluate.benchmarks import (
    Benchmark,
    BenchmarkError,
    Target,
    choose_protocol,
    load_benchmark,
)
from gmai_xtuner.evaluate.controls import controls_of, measure
from gmai_xtuner.evaluate.protocols import MAX_NEW_TOKENS, Asked, Protocol, ProtocolError, ask_for
from gmai_xtuner.evaluate.questions import Score
from gmai_xtuner.evaluate.report import write_report
from gmai_xtuner.evaluate.results import (
    Result,
    Scored,
    reason_of,
    score_all,
    summarise,
    write_result,
)
from gmai_xtuner.evaluate.store import (
    Answer,
    AnswerKey,
    AnswerStore,
    Given,
    Identity,
    Job,
    read_identity,
)
from gmai_xtuner.evaluate.tables import all_tables, group_tables, write_tables

log = logging.getLogger(__name__)
ALL = "all"
SHOWN = 300
"""Questions on a page: with their images about 6 MB."""
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Options:
    """How benchmarks are asked and scored: the command's options of the same names.

    Without ``protocols`` each variant has its default. Without ``max_new_tokens`` stored answers have their
    own.
    """

    out: Path
    protocols: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    limit: int | None = None
    report_questions: int = SHOWN
    max_new_tokens: int | None = None
    controls: bool = False


class Prepared(NamedTuple):
    """A benchmark that has been read, and what is to be asked of it."""

    benchmark: Benchmark
    asked: tuple[Asked, ...]


def prepare(
    target: Target, options: Options, *, require_images: bool = True, rank: int = 0
) -> Prepared:
    """Read a benchmark and find out, before anything is asked, whether it can be asked and scored so.

    The first process (``rank`` 0) logs what is left out. A ``GMAIError`` if the benchmark can't be read, or
    has no such protocol or scorer; the same in all processes.
    """
    name, data, variant = target.name, target.data, target.variant
    benchmark = load_benchmark(name, data, variant=variant, require_images=require_images)
    if benchmark.problems and rank == 0:
        first = benchmark.problems[0]
        told = (benchmark.title, _listed(benchmark.counted_problems()), first.record, first.detail)
        log.warning("%s: %s; the first is %s: %s", *told)
    asked: list[Asked] = []
    errors: list[GMAIError] = []
    longest = options.max_new_tokens or MAX_NEW_TOKENS
    known = benchmark.protocols
    protocols = [one for one in known if one.variant == benchmark.variant]
    if ALL not in options.protocols:
        names = options.protocols or (None,)
        protocols = [choose_protocol(known, name, variant=benchmark.variant) for name in names]
    for protocol in protocols:
        try:
            part = ask_for(protocol, benchmark.questions, options.limit, longest)
            for scorer in _other_scorers(protocol, options):
                protocol.check_scorer(scorer, part.questions)
            asked.append(part)
        except (EvaluationError, ProtocolError) as error:
            errors.append(error)
    if errors and (ALL not in options.protocols or not asked):
        raise errors[0]
    for passed_over in errors:
        log.warning("passed over: %s", passed_over)
    return Prepared(benchmark, tuple(asked))


def _other_scorers(protocol: Protocol, options: Options) -> list[str]:
    """Return the scorers besides the protocol's own, each once."""
    others = protocol.also if ALL in options.scorers else options.scorers
    return [scorer for scorer in dict.fromkeys(others) if scorer != protocol.scorer]


@dataclass(frozen=True)
class Answers:
    """What a benchmark's questions were answered: the answers, and by their ids those that got none.

    ``longest`` are tokens that stored answers were allowed, where nothing was asked now.
    """

    store: AnswerStore
    by_key: Mapping[AnswerKey, Answer]
    failed: Mapping[str, Given] = field(default_factory=dict)
    longest: int | None = None


def ask(
    prepared: Prepared, answerer: Answerer | None, options: Options, *, world: World
) -> Answers:
    """Ask what has no answer yet, all processes together; without an answerer read stored answers.

    A ``GMAIError`` if it can't go on. In one process alone, maybe: the others then wait for it.
    """
    benchmark = prepared.benchmark
    folder = options.out / f"{benchmark.name}-{benchmark.variant}"
    if answerer is not None:
        whose = (answerer.model, answerer.name, dict(answerer.generation), benchmark.hashes())
        store = AnswerStore(folder, Identity(benchmark.name, benchmark.variant, *whose))
        everything = list(prepared.asked)
        for asked in prepared.asked if options.controls else ():
            controls = controls_of(asked, benchmark.questions)
            everything += [control.asked for control in controls.values()]
        names, jobs = benchmark.known_as, (job for one in everything for _, job in one.jobs())
        named = (replace(job, benchmark=names) for job in jobs)
        return Answers(store, *answer_all(named, answerer, store, world=world))
    stored = read_identity(folder)
    if stored is None:
        raise EvaluationError(
            f"no answers are stored in {folder}. Leave --score-only out to ask, or give the --out of a run"
        )
    store = AnswerStore(folder, replace(stored, source=benchmark.hashes()))
    if world.rank:
        return Answers(store, {})
    told = "%s: the stored answers of %s (%s) are scored"
    log.warning(told, benchmark.title, stored.model_name, stored.model)
    found = store.read()
    longest = max((int(one.generation["max_new_tokens"]) for one in found.values()), default=None)
    return Answers(store, found, longest=longest)


def answer_all(
    jobs: Iterable[Job], answerer: Answerer, store: AnswerStore | None = None, *, world: World
) -> tuple[dict[AnswerKey, Answer], dict[str, Given]]:
    """Ask what has no answer yet; of jobs of the same words one.

    All processes take part. What a process has yielded is on disk; a stop loses the batches under way.
    Without a store answers are kept in memory alone. An ``EvaluationError`` if another run writes to the
    store, or the answerer can't go on.

    Returns answers by their keys, also those stored before, of a store in the first process alone; and the
    jobs that got none, by the id of their question, in all processes.
    """
    wanted: dict[AnswerKey, Job] = {}
    for job in jobs:
        wanted.setdefault(job.key, job)
    if isinstance(answerer, StoredAnswers):
        answerer.check({job.id for job in wanted.values()})
    known: dict[AnswerKey, Answer] = {}
    found: list[Answer] = []
    failed: dict[str, Given] = {}
    with ExitStack() as stack:
        if store is not None and world.rank == 0:
            # Only one process looks and locks, and all ask what it has found missing.
            stack.enter_context(store.locked())
            store.create()
            known = store.read()
        settled = {key for key, one in known.items() if not one.problem or answerer.repeats}
        pending = [job for key, job in wanted.items() if key not in settled]
        if store is not None:
            pending = world.from_first(pending)
        progress = stack.enter_context(_progress(store, len(pending), len(wanted), world))
        write = stack.enter_context(store.writer(world.rank)) if store is not None else None
        for batch in answerer.answers(pending, rank=world.rank, world_size=world.size):
            new = [
                Answer.of(one, model=answerer.model, generation=answerer.generation)
                for one in batch
                if one.text is not None
            ]
            if write is not None:
                write(new)
            found += new
            failed |= {one.job.id: one for one in batch if one.text is None}
            if failed:
                progress.set_postfix(without_answer=len(failed), refresh=False)
            progress.update(min(len(batch) * world.size, len(pending) - progress.n))
        if store is None:
            found = [one for part in world.gather(found) for one in part]
        failed = {name: one for part in world.gather(failed) for name, one in part.items()}
        if store is not None and world.size > 1:  # now that all have written
            known = store.read() if world.rank == 0 else {}
    return known | {one.key: one for one in found}, failed


def _progress(store: AnswerStore | None, pending: int, wanted: int, world: World) -> Any:
    """Show a bar on a terminal, a line now and then in a file; the other processes are as fast."""
    from tqdm import tqdm

    if store is None or world.rank:
        return tqdm(disable=True)
    name = f"{store.identity.benchmark} ({store.identity.variant})"
    if not pending:
        log.warning("%s: all %d answers are stored already", name, wanted)
    return tqdm(
        desc=name,
        total=pending,
        unit=" questions",
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        disable=not pending,
    )


def score(
    prepared: Prepared,
    answers: Answers,
    options: Options,
    *,
    world: World,
    judge: Answerer | None = None,
) -> list[Result]:
    """Score and write, in the first process; the others wait, also where it fails, and get no result.

    A ``GMAIError``, in the first process alone, if it can't be scored.
    """
    benchmark, failed = prepared.benchmark, answers.failed
    results: list[Result] = []
    try:
        if world.rank == 0:
            if failed:
                first = next(iter(failed.values()))
                counts = _listed(Counter(one.problem for one in failed.values()))
                where = f"question {first.job.id}: {first.detail}"
                log.warning("%s: %s; the first is %s", benchmark.name, counts, where)
            for asked in _answered(prepared.asked, answers, options):
                results += _score(asked, benchmark, answers, options, judge)
    finally:
        world.barrier()
    return results


def _answered(parts: Sequence[Asked], answers: Answers, options: Options) -> list[Asked]:
    """Return what is scored; of stored answers, ``--protocol all`` passes over what was never asked."""
    if options.max_new_tokens is None and answers.longest:
        parts = [replace(one, max_new_tokens=answers.longest) for one in parts]
    if ALL not in options.protocols or answers.failed:
        return list(parts)
    found = [one for one in parts if any(job.key in answers.by_key for _, job in one.jobs())]
    if found and (others := [one.name for one in parts if one not in found]):
        log.warning("passed over, since nothing of them is answered: %s", ", ".join(others))
    return found or list(parts)


def _score(
    asked: Asked, benchmark: Benchmark, answers: Answers, options: Options, judge: Answerer | None
) -> Iterator[Result]:
    """Score by the protocol's scorer, by others, and by a judge; write each result."""
    protocol, store, failed = asked.protocol, answers.store, answers.failed
    scored, missing = score_all(asked, answers.by_key)
    if not (scored or any(answer for _, answer in missing)):
        prompts = Counter(answer.protocol for answer in answers.by_key.values())
        reasons = Counter(one.problem for one in failed.values())
        raise EvaluationError(
            f"{store.folder} has no answer to a prompt of the protocol {asked.name}"
            + (f"; it has answers to those of {_listed(prompts)}" if prompts else "")
            + (f". Nothing was answered: {_listed(reasons)}" if reasons else "")
        )
    none = [Scored(question, one, Score(None, None)) for question, one in missing if one]
    lacking = [
        Scored(question, Answer.of(failed[question.id], model="", generation={}), Score(None, None))
        for question, one in missing
        if not one and question.id in failed
    ]
    if none:
        counts = _listed(Counter(one.answer.problem for one in none))
        log.warning(
            "%s: %d of %d answers are none (%s, at most %d tokens each); the first is of %s",
            *(asked.name, len(none), len(asked.questions), counts, asked.max_new_tokens),
            _example(none[0]),
        )
    names = {question.id for question in asked.questions}
    problems = benchmark.problems
    odd = Counter(one.reason for one in problems if not one.left_out and one.record in names)
    common: dict[str, Any] = {
        "left_out": Counter(one.reason for one in problems if one.left_out),
        "unanswered": Counter(reason_of(question, one, failed) for question, one in missing),
    }
    more: dict[str, Any] = {}
    if options.controls:
        found = measure(scored, controls_of(asked, benchmark.questions), answers.by_key, failed)
        more = dict(zip(("controls", "flags", "controls_unanswered"), found, strict=True))

    def result(scorer: str, scored: Sequence[Scored], **more: Any) -> Result:
        unread = [*none, *(one for one in scored if one.score.parsed is None)][:_EXAMPLES]
        more = {"findings": odd, "unread": tuple(map(_example, unread)), **common, **more}
        made = summarise(asked, scored, store.identity, scorer=scorer, **more)
        suffix = "" if scorer == protocol.scorer else f".{scorer}"
        folder = store.folder / _file_name(protocol.name + suffix)
        everyone = [*scored, *none, *lacking]
        write_result(folder, made, everyone)
        summary, *tables = [*all_tables([made]), *group_tables(made)]
        write_tables(folder, [summary, *tables])
        if shown := options.report_questions:
            write_report(folder / "report.html", made, tables, everyone, shown=shown)
        return made

    if (benchmark.name, benchmark.variant) == ("gmai_mmbench", "test"):
        _submit(store, benchmark, scored)
    yield result(protocol.scorer, scored, **more)
    for scorer in _other_scorers(protocol, options):
        scores = (protocol.score(one.question, one.answer.answer, scorer=scorer) for one in scored)
        rescored = [replace(one, score=new) for one, new in zip(scored, scores, strict=True)]
        yield result(scorer, rescored)
    if judge is not None:
        judged, unclear = _judge(asked, benchmark, scored, judge, options)
        findings = odd | ({"no_verdict": unclear} if unclear else {})
        name = f"{protocol.scorer}+{judging.judge_name(judge)}"
        yield result(name, judged, findings=findings)


def _example(one: Scored) -> str:
    why = one.answer.problem or "not understood"
    return f"question {one.question.id} ({why}): {one.answer.answer[-200:]!r}"


def _judge(
    asked: Asked, benchmark: Benchmark, scored: Sequence[Scored], judge: Answerer, options: Options
) -> tuple[list[Scored], int]:
    """Let a model judge what the rules leave open; replies are kept, and those without a verdict counted."""
    version = judging.PROMPT_VERSION
    folder = options.out / _file_name(f"judge-{judge.name}-{version}")
    store = AnswerStore(folder, Identity("judge", f"prompt {version}", judge.model, judge.name, {}))
    jobs = judging.judge_jobs(scored, benchmark.known_as)
    replies, failed = answer_all(jobs.values(), judge, store, world=World())
    if failed:
        first = next(iter(failed.values()))
        raise EvaluationError(
            f"the judge {judge.name} gave no verdict on {len(failed)} of {len(jobs)} answers, the first on "
            f"question {first.job.id}: {first.detail}. Verdicts are kept: the same command goes on"
        )
    judged, unclear = judging.apply_verdicts(scored, jobs, replies)
    said = "%s: the judge was asked about %d answers, %d of its replies are no verdict"
    log.warning(said, asked.name, len(jobs), unclear)
    return judged, unclear


def _submit(store: AnswerStore, benchmark: Benchmark, scored: Sequence[Scored]) -> None:
    """Write the file that the authors of GMAI-MMBench evaluate, once all of TEST has an answer."""
    from gmai_xtuner.evaluate.benchmarks.submission import write_submission

    answers = {one.question.id: one.answer.answer for one in scored}
    name = store.identity.model_name
    try:
        file = write_submission(store.folder, name, benchmark=benchmark, answers=answers)
    except BenchmarkError as error:
        log.warning("No submission file: %s", error)
    else:
        log.warning("To send to the authors of GMAI-MMBench: %s", file)


def _listed(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in ordered)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)
