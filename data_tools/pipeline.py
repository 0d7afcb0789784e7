# SPDX-License-Identifier: Apache-2.0

"""A job from its sources to the corpus folder; stopped at any moment, it goes on where it was.

::

    units -> read in workers -> store, a transaction a unit
          -> arrange: numbers, ids, duplicates               one source at a time
          -> plan, write, check in workers -> store
          -> what a model is to write -> writer -> store, as answers come
          -> output
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_tools import readers, standardise, writers
from data_tools.checks import CHECK_VERSION
from data_tools.command import Bar
from data_tools.executor import Executor, open_executor
from data_tools.forms import FORM_VERSIONS
from data_tools.items import FORMS, SourceContext, Task
from data_tools.job import Job, fingerprint
from data_tools.licences import Terms, publishable_part, refusal
from data_tools.output import review
from data_tools.output.build import build, recover
from data_tools.privacy import Names, neutral_errors, salted
from data_tools.readers import SourceOptions
from data_tools.readers.files import files, listed
from data_tools.records import Drop, Unit, by_reason
from data_tools.standardise import IMAGES, UnitResult
from data_tools.store import Store, Vocabulary
from data_tools.worker import Recipe, make, read_units, unit_fingerprint, worker_taxonomy
from data_tools.writers.asking import CleanStop, Outcome
from gmai_xtuner.core.errors import CorpusError, JobError

WORK = ".work"
STATE = "state.sqlite"

_TASK_SECONDS = 0.1
"""Units are put together until a task takes about as long, so that handing it over costs little."""
_MOST_UNITS = 64
_COMMIT_SECONDS = 0.5  # of a model's answers

# What neither the records nor the answers depend on.
_NOT_OF_RECORDS = ("root", "links", "codes_are_names", "synonyms", "chinese", "negatives",
                   "may_be_sent_to")  # fmt: skip
_NOT_OF_ANSWERS = ("name", "terms", "key_variable", "in_flight", "requests_a_minute", "tokens_a_minute",
                   "timeout", "server_retries", "patience", "price", "budget", "cache", "discount",
                   "max_requests", "max_bytes", "max_batches", "wait", "poll")  # fmt: skip

# Labels that are a number, a numbered word that says nothing, or an answer: ``7``, ``Segment_1``, ``no``.
_CODE = re.compile(
    r"(?:(?:label|class|category|segment|structure|region|object|mask|roi|id|value|code)[\s_.#-]*)?"
    r"[-+]?\d+(?:[.,]\d+)?|none|null|nan|true|false|yes|no",
    re.IGNORECASE,
)
_MOST_REASONS = 5

# What `store_image` writes, whole or aside; anything else in the folder is somebody's and stays.
_STORED = re.compile(r"/[0-9a-f]{2}/\.?[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a job that is run: ``only`` these sources (empty: all), ``limit`` records of each at most.

    ``grounded`` False: nothing of the annotation is in a prompt (the paper's ablation).
    """

    limit: int | None = None
    only: tuple[str, ...] = ()
    grounded: bool = True

    def sources(self, job: Job) -> tuple[SourceOptions, ...]:
        names = [source.name for source in job.sources]
        for name in self.only:
            if name not in names:
                raise JobError(
                    f"{job.path}: there is no source {name!r}; there are {', '.join(names)}."
                )
        return tuple(s for s in job.sources if not self.only or s.name in self.only)


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended: the values of ``summary.json``, and conversations that a later run is to write.

    ``stopped`` says why it ended before its end; None: it is complete.
    """

    summary: dict[str, Any]
    pending: int = 0
    stopped: CorpusError | None = None


def run(job: Job, selection: Selection, *, progress: Bar | None = None) -> Result:
    """Do what is left to do of a job, and build its corpus.

    A `CorpusError` if it can't be done, or a source is refused as a whole, since it has no record or labels
    that are no names; what was done is kept.
    """
    progress, job = progress or Bar(quiet=True), publishable_part(job)
    chosen = selection.sources(job)
    check_writer(job, selection)
    kept = kept_sources(job, chosen)
    writers.check_sending(job, kept)
    if job.writer.name != "template" and not (job.output / WORK / STATE).exists():
        job.writer.key()  # before hours of reading; a later run may have nothing left to ask
    with lock(job.output), Store(job.output / WORK / STATE) as store:
        recover(job.output)
        job = _salted(job, store)
        chosen = selection.sources(job)
        kept = kept_sources(job, chosen)
        store.open_sources(
            [(source.name, _depends(source, job)) for source in job.sources],
            only=[source.name for source in chosen],
        )
        with open_executor(job.engine, job.workers) as executor:
            work = _Run(job, selection, store, executor, progress)
            for _ in range(2):
                for source in chosen:
                    work.read(source)
                # An image that somebody took away is made again by reading its unit again.
                if not _forget_units_without_images(store, job.output / IMAGES):
                    break
            refused = {s.name: text for s in chosen if (text := work.refusal(s))}
            for source in kept:  # nothing is paid for what the corpus leaves out
                if source.name not in refused:
                    work.make(source)
        stopped = None if refused else work.ask_model()
        progress.stage("building the corpus")
        summary = build(store, job, job.output)
        # Only now: until here the corpus of the run before was the one that is there.
        _forget_units_without_images(store, job.output / IMAGES, delete_strays=True)
        with store.transaction():
            pass  # each transaction adds the time since the one before to the job's seconds
        if refused:
            raise CorpusError("\n".join(refused.values()))
        return Result(summary, store.count_pending(), stopped)


def kept_sources(job: Job, sources: Iterable[SourceOptions]) -> list[SourceOptions]:
    """Return the sources that the job's rules on licences keep."""
    return [source for source in sources if refusal(source.licence, job.corpus) is None]


def _salted(job: Job, store: Store) -> Job:
    """Return the job with the salts of its names; those made of files stay while the state does."""
    sources = map(salted, job.sources)
    kept = tuple(
        s.model_copy(update={"salt": store.remember(f"salt {s.name}", s.salt)}) if s.salt else s
        for s in sources
    )
    return job.model_copy(update={"sources": kept})


def neutral_names(job: Job, selection: Selection) -> Iterator[tuple[str, str, str]]:
    """Yield source, neutral name and path of each file, for the eyes of who has the data."""
    if (job.output / WORK / STATE).is_file():
        with Store(job.output / WORK / STATE) as store:
            job = _salted(job, store)
    for source in map(salted, selection.sources(job)):
        names = Names(source)
        yield from ((source.name, names.file(path), path) for path in files(source))


def write_review(job: Job, count: int) -> Path:
    """Write the page on which people judge the corpus, see `output.review`."""
    with lock(job.output), Store(job.output / WORK / STATE) as store:
        store.choose([source.name for source in job.sources])
        return review.write(store, job.output, title=job.title, count=count)


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """One run at a time in an output folder; the system takes the lock back from a run that was killed.

    A `CorpusError` if another run has it, or the folder can't be written to.
    """
    file = output / WORK / "lock"
    _check_is_ours(output)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file, timeout=0)
        held.acquire()
    except Timeout as error:
        raise CorpusError(
            f"another run is writing to {output} (it holds {file}). Wait for it, stop it, or name another "
            "folder with --output."
        ) from error
    except OSError as error:
        raise CorpusError(f"the output folder {output} can't be written to ({error}).") from error
    try:
        yield
    finally:
        held.release()


def _check_is_ours(output: Path) -> None:
    """A run replaces and deletes in its output folder: it must be empty or an earlier run's."""
    for folder in (output / WORK, output / IMAGES):
        if folder.is_symlink():
            raise CorpusError(
                f"{folder} is a link, and a run would delete files where it leads. Make the whole output "
                "folder a link, or name another one"
            )
    if any((output / WORK / name).is_file() for name in (STATE, "lock")):
        return
    try:
        found = sorted(entry.name for entry in os.scandir(output))
        if found == [WORK] and not os.listdir(output / WORK):  # of a run that was killed at once
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise CorpusError(f"the output folder {output} can't be read ({error}).") from error
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise CorpusError(
            f"the output folder {output.resolve()} is not empty ({shown}) and isn't an "
            f"earlier run's (there is no {WORK}/{STATE} in it). A run would replace files in it: name a new "
            "folder in `output` or with --output."
        )


def _depends(source: SourceOptions, job: Job) -> str:
    """Return everything that a source's records depend on, but for its files."""
    module = readers.load(source.reader)
    versions = (standardise.VERSION, getattr(module, "VERSION", 1))
    terms = "" if job.taxonomy is None else _hash(worker_taxonomy(job.taxonomy).kinds).hex()
    if source.names_licences:  # what may not be published is not read
        own = (job.corpus.licences, job.corpus.refuse, job.corpus.publishable, job.agreements)
        terms += _hash(own).hex()
    return f"{fingerprint(source, without=_NOT_OF_RECORDS)} {versions} {terms}"


def _hash(*parts: Any) -> bytes:
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _forget_units_without_images(
    store: Store, folder: Path, *, delete_strays: bool = False
) -> bool:
    """Make units unread whose images are missing, and return whether there were any."""
    stored = (
        f"{folder.name}/{shard.name}/{file.name}"
        for shard in (os.scandir(folder) if folder.is_dir() else ())
        if shard.is_dir()
        for file in os.scandir(shard)
    )
    missing, strays = store.compare_images(stored)
    for name in filter(_STORED.search, strays if delete_strays else ()):
        (folder.parent / name).unlink(missing_ok=True)
    return missing


def source_context(job: Job, source: SourceOptions, found: Vocabulary) -> SourceContext:
    """Return what is known of a source whose records have the labels ``found``.

    The job says which labels are annotated in every image, if the source doesn't. Where each record is of one
    class, the class is known of every image.
    """
    said = job.make.negatives if source.negatives is None else source.negatives
    everywhere = found.one_class if said is None else said
    if isinstance(everywhere, bool):
        everywhere = found.names if everywhere else ()
    return SourceContext(
        source=source.name,
        dataset=source.dataset or source.name,
        vocabulary=found.names,
        synonyms=dict(source.synonyms),
        chinese=dict(source.chinese),
        known=everywhere,
        by_image=said is None,
    )


def recipe_of(job: Job, context: SourceContext, *, grounded: bool) -> Recipe:
    """Return how a source's conversations are made."""
    answers = None
    if job.writer.name != "template":
        from data_tools.writers.prompts import PROMPT_VERSION

        answers = _hash(
            fingerprint(job.writer, without=_NOT_OF_ANSWERS),
            fingerprint(job.checks),
            grounded,
            context,
            worker_taxonomy(job.taxonomy).kinds,
            CHECK_VERSION,
            PROMPT_VERSION,
        )
    return Recipe(job.make, job.checks, job.seed, job.taxonomy, context, answers)


def check_writer(job: Job, selection: Selection) -> None:
    """Without annotations only a model can write: a template has nothing else to write from.

    A `CorpusError` if the job's writer is the template writer.
    """
    if not selection.grounded and job.writer.name == "template":
        raise CorpusError(
            f"{job.path}: --without-annotations needs a model as the job's writer: the template writer "
            "writes from the annotation alone."
        )


class _Run:
    """The steps of a run, a source at a time."""

    def __init__(
        self, job: Job, selection: Selection, store: Store, executor: Executor, progress: Bar
    ) -> None:
        self.job, self.selection, self.store = job, selection, store
        self.executor, self.progress = executor, progress
        self.ids = {name: source for source, name in store.sources()}
        self.units_a_task = (
            1  # of reading; it follows the time that tasks take, and changes no result
        )

    # --- reading: a place is a unit's number in its source ----------------------------------------

    def read(self, source: SourceOptions) -> None:
        """Read units that are new or have changed, up to the limit of records, and arrange what is there."""
        number, limit = self.ids[source.name], self.selection.limit
        self.progress.stage(f"reading {source.name}")
        found: set[bytes] = set()

        def needed() -> Iterator[tuple[int, int]]:
            for unit in units:
                yield unit
                if limit is not None:
                    found.update(self.store.duplicate_keys(unit[0]))
                    if len(found) >= limit:
                        return

        with neutral_errors(source), closing(self._units(source, number)) as units:
            self.store.arrange(number, needed(), limit=limit)

    def _units(self, source: SourceOptions, number: int) -> Generator[tuple[int, int], None, None]:
        """Yield id and place of each unit, in their order; those that are new are read."""
        known: deque[tuple[int, int]] = deque()
        names = Names(source)
        self.units_a_task = 1
        own = (self.job.output, self.job.taxonomy, Terms(self.job.corpus, self.job.agreements))
        function = partial(read_units, source, *own)

        def batches() -> Iterator[list[tuple[int, Unit]]]:
            """Yield what is to be read, some units together; those that are read already go to ``known``."""
            waiting: list[tuple[int, Unit]] = []
            module = readers.load(source.reader)
            for place, unit in enumerate(module.units(source)):
                before = self.store.known_unit(number, names.file(unit.key))
                kept = names.sealed(unit.key, before[2]) if before else ()
                if before and before[1] == unit_fingerprint(source.root, unit, kept):
                    known.append((before[0], place))
                    continue
                waiting.append((place, unit))
                if len(waiting) >= self.units_a_task:
                    yield waiting
                    waiting = []
            if waiting:
                yield waiting

        with closing(self._results(function, batches())) as results:
            for place, unit, result in results:
                key, sealed = names.file(unit.key), names.sealed(unit.key, result.files)
                while known and known[0][1] < place:
                    yield known.popleft()
                row = self.store.add_unit(number, key, replace(result, files=sealed))
                self.progress.advance(records=len(result.stored))
                yield row, place
        yield from known

    def _results(
        self, function: Any, batches: Iterable[list[tuple[int, Unit]]]
    ) -> Generator[tuple[int, Unit, UnitResult], None, None]:
        """Yield unit by unit. Where a worker dies over several, each is tried alone to find the one."""
        with closing(self.executor.map(function, batches, died=lambda _: None)) as results:
            for batch, read in results:
                if read is not None:
                    units, seconds = read
                    if seconds < _TASK_SECONDS / 2:
                        self.units_a_task = min(max(self.units_a_task, 2 * len(batch)), _MOST_UNITS)
                    elif seconds > 2 * _TASK_SECONDS:
                        self.units_a_task = max(1, len(batch) // 2)
                    yield from ((*placed, unit) for placed, unit in zip(batch, units, strict=True))
                elif len(batch) > 1:
                    yield from self._results(function, ([placed] for placed in batch))
                else:
                    detail = "a library crashed, or the system ended the process for its memory"
                    where = Names(function.args[0]).file(batch[0][1].key)
                    drop = Drop("read", "the reading process died", where, detail)
                    yield (*batch[0], UnitResult(drops=(drop,), samples=1, fingerprint=b"died"))

    def refusal(self, source: SourceOptions) -> str | None:
        """Return why nothing is said of a source that was read; None if nothing speaks against it."""
        labels = self.store.vocabulary(self.ids[source.name]).names
        codes = [label for label in labels if _CODE.fullmatch(label)]
        if codes and not source.codes_are_names:
            return (
                f"source {source.name!r} has labels that are no names: {listed(codes, at_most=60)}. Its "
                "records are kept, but no text is made of them. Say what they are, "
                f"`labels: {{{codes[0]!r}: ...}}`, or that they are meant so, `codes_are_names: true`."
            )
        if labels:
            return None
        found = by_reason(drop for name, drop in self.store.drops() if name == source.name)
        shown = "; ".join(
            f"{reason} ({count}, such as {': '.join(filter(None, (first.where, first.detail)))})"
            for (_, reason), (count, first) in list(found.items())[:_MOST_REASONS]
        )
        why = "Nothing was read from it: correct `root` and the patterns of its files."
        return f"source {source.name!r} has no record. {f'All was left out: {shown}.' if shown else why}"

    # --- conversations ----------------------------------------------------------------------------

    def make(self, source: SourceOptions) -> None:
        """Make the conversations of a source's records that were not made in this very way."""
        job, number = self.job, self.ids[source.name]
        found = self.store.vocabulary(number)
        unnamed = [name for name in found.names if name not in source.chinese]
        if job.make.chinese and unnamed:
            share = [f"{name!r} ({found.records[name] / found.count:.0%})" for name in unnamed[:40]]
            told = f"{len(unnamed)} labels without a name in `chinese`, whose records are in English alone"
            self.progress.note(f"source {source.name!r}: {told}: {', '.join(share)}")
        context = source_context(job, source, found)
        recipe = recipe_of(job, context, grounded=self.selection.grounded)
        versions = {form: FORM_VERSIONS[form] for form in FORMS if getattr(job.make, form)}
        made = _hash(
            fingerprint(recipe.make),
            fingerprint(job.checks),
            job.seed,
            recipe.context,
            recipe.answers,
            worker_taxonomy(job.taxonomy).kinds,
            versions | {"checks": CHECK_VERSION},
        ).hex()
        total = self.store.count_to_make(number, made)
        self.progress.stage(f"making {source.name}", total=total)
        chunks = self.store.to_make(number, made)
        for records, items in self.executor.map(partial(make, pickle.dumps(recipe)), chunks):
            self.store.add_made(made, zip(records, items, strict=True))
            self.progress.advance(len(records))

    def ask_model(self) -> CorpusError | None:
        """Have pending items written. What stops the writer cleanly is returned."""
        job, store = self.job, self.store
        total = store.count_pending()
        if not total or job.writer.name == "template":
            return None
        contexts = {
            s.name: source_context(job, s, store.vocabulary(self.ids[s.name]))
            for s in job.sources
            if s.name in self.ids
        }
        writer = writers.model_writer(job, grounded=self.selection.grounded)
        rows: dict[str, int] = {}
        answered: list[tuple[int, Outcome]] = []

        def tasks() -> Iterator[Task]:
            for kept in store.pending():
                rows[kept.item.id] = kept.row
                yield Task(kept.item, kept.record, contexts[kept.record.provenance.source])

        def keep() -> None:
            with store.transaction():
                for row, outcome in answered:
                    store.add_outcome(row, outcome)
            answered.clear()

        self.progress.stage("asking the model", total=total)
        last = time.monotonic()
        try:
            for outcome in writer.write(tasks()):
                answered.append((rows.pop(outcome.item.id), outcome))
                self.progress.advance(dollars=outcome.dollars)
                if time.monotonic() - last > _COMMIT_SECONDS:
                    keep()
                    last = time.monotonic()
        except CleanStop as stop:
            return stop
        finally:
            keep()
        return None
