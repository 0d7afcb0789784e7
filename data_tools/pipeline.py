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
import heapq
import os
import pickle
import re
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from data_tools import readers, refusals, standardise, writers
from data_tools.checks import CHECK_VERSION
from data_tools.executor import Executor, open_executor
from data_tools.fingerprints import unit_fingerprint
from data_tools.forms import FORM_VERSIONS
from data_tools.forms.options import MakeOptions
from data_tools.items import FORMS, SourceContext
from data_tools.job import Job, fingerprint
from data_tools.output import review
from data_tools.output.build import build, recover
from data_tools.output.licences import refused_sources
from data_tools.progress import Bar
from data_tools.readers import SourceOptions
from data_tools.records import Drop, Unit
from data_tools.standardise import IMAGES
from data_tools.store import Store, StoredRecord, StoredUnit, Vocabulary
from data_tools.worker import Recipe, make, read_units, worker_taxonomy
from data_tools.writers.asking import CleanStop, Outcome, Task
from gmai_xtuner.core.errors import CorpusError, JobError

WORK = ".work"
STATE = "state.sqlite"

_TASK_SECONDS = 0.1
"""Units are put together until a task takes about as long, so that handing it over costs little."""
_MOST_UNITS = 64

# What neither the records nor the answers depend on.
_NOT_OF_RECORDS = (
    *("root", "links", "codes_are_names", "synonyms", "chinese", "negatives"),
    "may_be_sent_to",
)
_NOT_OF_ANSWERS = (
    "name",
    "key_variable",
    "in_flight",
    "requests_a_minute",
    "tokens_a_minute",
    "timeout",
    "server_retries",
    "patience",
    "price",
    "budget",
    "cache",
    "discount",
    "max_requests",
    "max_bytes",
    "max_batches",
    "wait",
    "poll",
)


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a job that is run.

    Args:
        limit: records of each source at most.
        only: names of the sources; empty: all.
        grounded: False: nothing of the annotation is in a prompt (the paper's ablation).
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
    """How a run ended.

    Args:
        summary: of the corpus, as in ``summary.json``.
        pending: conversations that a later run is to write.
        stopped: why it ended before its end; None: it is complete.
    """

    summary: dict[str, Any]
    pending: int = 0
    stopped: CorpusError | None = None


def run(job: Job, selection: Selection, *, progress: Bar | None = None) -> Result:
    """Do what is left to do of a job, and build its corpus.

    Raises:
        CorpusError: it can't be done, or a source is refused as a whole (see `refusals`); what was done is
            kept.
    """
    progress = progress or Bar(quiet=True)
    chosen = selection.sources(job)
    check_writer(job, selection)
    writers.check_sending(job, kept_sources(job, chosen))
    if job.writer.name != "template" and not (job.output / WORK / STATE).exists():
        writers.check_key(job)  # before hours of reading; a later run may have nothing left to ask
    with lock(job.output), Store(job.output / WORK / STATE) as store:
        recover(job.output)
        store.open_sources(
            [(source.name, _depends(source, job)) for source in job.sources],
            only=[source.name for source in chosen],
        )
        ids = {name: source for source, name in store.sources()}
        with open_executor(job.engine, job.workers) as executor:
            for _ in range(2):
                for source in chosen:
                    reading = _Reading(job, source, ids[source.name], store, executor, progress)
                    reading.run(selection.limit)
                # An image that somebody took away is made again by reading its unit again.
                if not _compare_images(store, job.output / IMAGES):
                    break
            refused = _refused(chosen, ids, store)
            for source in chosen:
                # Nothing is paid for a source that the corpus leaves out.
                if source in kept_sources(job, chosen) and source.name not in refused:
                    _make(job, source, ids[source.name], store, executor, selection, progress)
        stopped = None if refused else _write(job, store, selection, progress)
        progress.stage("building the corpus")
        summary = build(store, job, job.output)
        # Only now: until here the corpus of the run before was the one that is there.
        _compare_images(store, job.output / IMAGES, delete=True)
        with store.transaction():
            pass  # keeps the seconds
        if refused:
            raise CorpusError("\n".join(refused.values()))
        return Result(summary, store.count_pending(), stopped)


def kept_sources(job: Job, sources: Iterable[SourceOptions]) -> list[SourceOptions]:
    """Return the sources that the job's rules on licences keep."""
    refused = refused_sources(job)
    return [source for source in sources if source.name not in refused]


def write_review(job: Job, count: int) -> Path:
    """Write the page on which people judge the corpus, see `output.review`."""
    with lock(job.output), Store(job.output / WORK / STATE) as store:
        store.choose([source.name for source in job.sources])
        return review.write(store, job.output, title=job.title, count=count)


def _refused(
    sources: Sequence[SourceOptions], ids: Mapping[str, int], store: Store
) -> dict[str, str]:
    """Return why sources are refused as a whole, by their names."""
    found = {}
    for source in sources:
        drops = (drop for name, drop in store.drops() if name == source.name)
        if reason := refusals.refusal(source, store.vocabulary(ids[source.name]).names, drops):
            found[source.name] = reason
    return found


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """One run at a time in an output folder; the system takes the lock back from a run that was killed.

    Raises:
        CorpusError: another run has it, or the folder can't be written to.
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


# --- reading --------------------------------------------------------------------------------------


def _depends(source: SourceOptions, job: Job) -> str:
    """Return everything that a source's records depend on, but for its files."""
    module = readers.load(source.reader)  # type: ignore[attr-defined]
    versions = (standardise.VERSION, getattr(module, "VERSION", 1))
    terms = "" if job.taxonomy is None else _hash(worker_taxonomy(job.taxonomy).kinds).hex()
    return f"{fingerprint(source, without=_NOT_OF_RECORDS)} {versions} {terms}"


class _Placed(NamedTuple):
    """A unit and its place in the source."""

    place: int
    unit: Unit


class _Reading:
    """Reads those units of a source that are new or have changed."""

    def __init__(
        self,
        job: Job,
        source: SourceOptions,
        number: int,
        store: Store,
        executor: Executor,
        progress: Bar,
    ) -> None:
        self.source, self.number, self.store = source, number, store
        self.executor, self.progress = executor, progress
        self.function = partial(read_units, source, job.output, job.taxonomy)
        self.size = 1  # units of a task
        self.known: deque[tuple[int, int]] = deque()  # id and place of units that are read already

    def run(self, limit: int | None) -> None:
        """Read until the limit of records is reached, and arrange what is there in the corpus."""
        self.progress.stage(f"reading {self.source.name}")
        self.store.begin_order()
        found: set[bytes] = set()
        with closing(self._units()) as units:
            for unit, place in units:
                self.store.order([(unit, place)])
                if limit is not None:
                    found.update(self.store.duplicate_keys(unit))
                    if len(found) >= limit:
                        break
        self.store.arrange(self.number, limit=limit)

    def _units(self) -> Generator[tuple[int, int], None, None]:
        """Yield id and place of each unit, in their order; those that are new are read."""
        with closing(self._read(self._batches())) as results:
            for (place, unit), result in results:
                yield from self._known_before(place)
                row = self.store.add_unit(self.number, unit.key, result)
                self.progress.advance(records=len(result.records))
                yield row, place
        yield from self._known_before(float("inf"))

    def _known_before(self, place: float) -> Iterator[tuple[int, int]]:
        while self.known and self.known[0][1] < place:
            yield self.known.popleft()

    def _batches(self) -> Iterator[list[_Placed]]:
        """Yield what is to be read, some units together; those that are read already go to ``known``."""
        waiting: list[_Placed] = []
        module = readers.load(self.source.reader)  # type: ignore[attr-defined]
        for place, unit in enumerate(module.units(self.source)):
            known = self.store.known_unit(self.number, unit.key)
            if known is not None and known[1] == unit_fingerprint(self.source.root, unit, known[2]):
                self.known.append((known[0], place))
                continue
            waiting.append(_Placed(place, unit))
            if len(waiting) >= self.size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _read(
        self, batches: Iterable[list[_Placed]]
    ) -> Generator[tuple[_Placed, StoredUnit], None, None]:
        """Yield unit by unit. Where a worker dies over several, each is tried alone to find the one."""
        flight: deque[list[_Placed]] = deque()

        def tasks() -> Iterator[list[Unit]]:
            for batch in batches:
                flight.append(batch)
                yield [placed.unit for placed in batch]

        results = self.executor.map(self.function, tasks(), died=lambda _: None)
        with closing(results):
            for read in results:
                batch = flight.popleft()
                if read is not None:
                    units, seconds = read
                    self._adapt_size(seconds, len(batch))
                    yield from zip(batch, units, strict=True)
                elif len(batch) > 1:
                    yield from self._read([placed] for placed in batch)
                else:
                    detail = "a library crashed, or the system ended the process for its memory"
                    drop = Drop("read", "the reading process died", batch[0].unit.key, detail)
                    yield batch[0], StoredUnit(b"died", drops=(drop,), samples=1)

    def _adapt_size(self, seconds: float, count: int) -> None:
        """Let a task grow until it takes long enough; that changes no result."""
        if seconds < _TASK_SECONDS / 2:
            self.size = min(max(self.size, 2 * count), _MOST_UNITS)
        elif seconds > 2 * _TASK_SECONDS:
            self.size = max(1, count // 2)


# What `store_image` writes, whole or aside; anything else in the folder is somebody's and stays.
_STORED = re.compile(r"/[0-9a-f]{2}/\.?[0-9a-f]{32}")


def _compare_images(store: Store, folder: Path, *, delete: bool = False) -> bool:
    """Compare the images of records with those that are stored.

    Units whose images are missing become unread.

    Args:
        store: of the job.
        folder: of the images.
        delete: remove those that no record refers to.

    Returns:
        True if images were missing.
    """
    both = heapq.merge(
        ((name, "wanted") for name in store.images()),
        ((name, "stored") for name in _stored_images(folder)),
    )
    missing: list[str] = []
    for name, pairs in groupby(both, key=lambda pair: pair[0]):
        sides = {side for _, side in pairs}
        if sides == {"wanted"}:
            missing.append(name)
        elif sides == {"stored"} and delete and _STORED.search(name):
            (folder.parent / name).unlink(missing_ok=True)
    for name in missing:
        store.forget_image(name)
    return bool(missing)


def _stored_images(folder: Path) -> Iterator[str]:
    """Yield the path below the corpus of every file in its folder of images, sorted as text."""
    if not folder.is_dir():
        return
    for shard in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        for name in sorted(entry.name for entry in os.scandir(folder / shard)):
            yield f"{folder.name}/{shard}/{name}"


# --- making ---------------------------------------------------------------------------------------


def source_context(job: Job, source: SourceOptions, found: Vocabulary) -> SourceContext:
    """Return what is known of a source whose records have these labels.

    Args:
        job: says which labels are annotated in every image, if the source doesn't.
        source: of the job.
        found: in its records. Where each is of one class, the class is known of every image.
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


def versions_of_text(make: MakeOptions) -> dict[str, int]:
    """Return the versions of everything that decides on the text of the forms that are made."""
    versions = {form: FORM_VERSIONS[form] for form in FORMS if getattr(make, form)}
    return versions | {"checks": CHECK_VERSION}


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


def _hash(*parts: Any) -> bytes:
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _make(
    job: Job,
    source: SourceOptions,
    number: int,
    store: Store,
    executor: Executor,
    selection: Selection,
    progress: Bar,
) -> None:
    """Make the conversations of a source's records that were not made in this very way."""
    context = source_context(job, source, store.vocabulary(number))
    recipe = recipe_of(job, context, grounded=selection.grounded)
    made = _hash(
        fingerprint(recipe.make),
        fingerprint(job.checks),
        job.seed,
        context,
        recipe.answers,
        worker_taxonomy(job.taxonomy).kinds,
        versions_of_text(recipe.make),
    ).hex()
    progress.stage(f"making {source.name}", total=store.count_to_make(number, made))
    flight: deque[list[StoredRecord]] = deque()

    def chunks() -> Iterator[list[StoredRecord]]:
        for records in store.to_make(number, made):
            flight.append(records)
            yield records

    for items in executor.map(partial(make, pickle.dumps(recipe)), chunks()):
        records = flight.popleft()
        store.add_made(number, made, zip(records, items, strict=True))
        progress.advance(len(records))


# --- a model's answers ----------------------------------------------------------------------------

_COMMIT_SECONDS = 0.5


def check_writer(job: Job, selection: Selection) -> None:
    """Without annotations only a model can write: a template has nothing else to write from.

    Raises:
        CorpusError: the job's writer is the template writer.
    """
    if not selection.grounded and job.writer.name == "template":
        raise CorpusError(
            f"{job.path}: --without-annotations needs a model as the job's writer: the template writer "
            "writes from the annotation alone."
        )


def _write(job: Job, store: Store, selection: Selection, progress: Bar) -> CorpusError | None:
    """Have pending items written. What stops the writer cleanly is returned."""
    total = store.count_pending()
    if not total or job.writer.name == "template":
        return None
    options = {source.name: source for source in job.sources}
    contexts = {
        name: source_context(job, options[name], store.vocabulary(number))
        for number, name in store.sources()
    }
    writer = writers.model_writer(job, grounded=selection.grounded)
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

    progress.stage("asking the model", total=total)
    last = time.monotonic()
    try:
        for outcome in writer.write(tasks()):
            answered.append((rows.pop(outcome.item.id), outcome))
            progress.advance(dollars=outcome.dollars)
            if time.monotonic() - last > _COMMIT_SECONDS:
                keep()
                last = time.monotonic()
    except CleanStop as stop:
        return stop
    finally:
        keep()
    return None
