"""A job from its sources to the corpus folder; stopped at any moment, it goes on where it was.

::

    units -> read in workers -> store, a transaction a unit
          -> arrange: numbers, ids, duplicates               one source at a time
          -> plan, write, check in workers -> store
          -> what a model is to write -> writer -> store, as answers come
          -> output
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from data_tools import readers, standardise
from data_tools.executor import Executor, open_executor
from data_tools.forms.options import MakeOptions
from data_tools.items import SourceContext
from data_tools.job import Job, fingerprint
from data_tools.output import publish
from data_tools.output.build import build
from data_tools.output.licences import refusal
from data_tools.readers.source import SourceOptions
from data_tools.records import Drop, Unit
from data_tools.stamps import stamp
from data_tools.standardise import IMAGES, read_unit
from data_tools.store import Store, UnitRows, rows_of
from data_tools.worker import Making, make, worker_taxonomy
from data_tools.writers.outcome import CleanStop, Outcome, Task
from gmai_xtuner.core.errors import CorpusError, JobError

WORK = ".work"
STATE = "state.sqlite"

_TASK_SECONDS = 0.1
"""Units are put together until a task takes about as long, so that handing it over costs little."""
_MOST_UNITS = 64

# What neither the records nor the answers depend on.
_NOT_OF_RECORDS = ("root", "synonyms", "chinese", "negatives")
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
_PACKAGE = Path(__file__).parent
# What a conversation depends on besides the job: a new release writes anew what it would write differently.
_CODE_OF_TEXT = ("forms", "checks*", "taxonomy*", "making.py", "items.py")
_CODE_OF_PROMPTS = ("writers/prompts*",)


class Progress(Protocol):
    """Is told how far a run is."""

    def stage(self, name: str, *, total: int | None = None) -> None: ...

    def advance(self, count: int = 1, **facts: Any) -> None: ...


class Silent:
    """Tells nobody."""

    def stage(self, name: str, *, total: int | None = None) -> None:
        pass

    def advance(self, count: int = 1, **facts: Any) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a job is run.

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
    stopped: CorpusError | None = field(default=None)


def run(job: Job, selection: Selection, *, progress: Progress | None = None) -> Result:
    """Do what is left to do of a job, and build its corpus.

    Raises:
        CorpusError: it can't be done; what was done is kept.
    """
    progress = progress or Silent()
    chosen = selection.sources(job)
    check_writer(job, selection)
    if job.writer.name != "template" and not (job.output / WORK / STATE).exists():
        from data_tools.writers.models import check_key

        check_key(job)  # before hours of reading; a later run may have nothing left to ask
    taxonomy = worker_taxonomy(job.taxonomy)
    with lock(job.output), Store(job.output / WORK / STATE) as store:
        publish.recover(job.output)
        store.open_sources(
            [(source.name, _depends(source, job)) for source in job.sources],
            only=[source.name for source in chosen],
        )
        with open_executor(job.engine, job.workers) as engine:
            for _ in range(2):
                for source in chosen:
                    _read(job, source, store, engine, selection.limit, progress)
                # A picture that somebody took away is made again by reading its unit again.
                if not _compare(store, job.output / IMAGES):
                    break
            for number, name in store.sources():
                source = next(source for source in chosen if source.name == name)
                if refusal(source.licence, job.corpus) is not None:
                    continue  # nothing is paid for what the corpus leaves out
                _make(job, source, number, store, engine, selection, progress)
        stopped = _write(job, store, selection, progress)
        progress.stage("building the corpus")
        summary = build(store, job, job.output, taxonomy=taxonomy)
        # Only now: until here the corpus of the run before was the one that is there.
        _compare(store, job.output / IMAGES, delete=True)
        with store.transaction():
            pass  # keeps the seconds
        return Result(summary, store.count_pending(), stopped)


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
    if (output / WORK).is_dir():
        return
    try:
        found = sorted(entry.name for entry in os.scandir(output))
    except FileNotFoundError:
        return
    except OSError as error:
        raise CorpusError(f"the output folder {output} can't be read ({error}).") from error
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise CorpusError(
            f"the output folder {output.resolve()} is not empty ({shown}) and isn't an earlier run's "
            f"(there is no {WORK} in it). A run would replace files in it: name a new or an empty folder in "
            "`output` or with --output."
        )


# --- reading --------------------------------------------------------------------------------------


def _depends(source: SourceOptions, job: Job) -> str:
    """Everything that a source's records depend on, but for its files."""
    module = readers.load(source.reader)  # type: ignore[attr-defined]
    versions = (standardise.VERSION, getattr(module, "VERSION", 1))
    taxonomy = "" if job.taxonomy is None else _digest([job.taxonomy])
    return f"{fingerprint(source, without=_NOT_OF_RECORDS)} {versions} {taxonomy}"


def _digest(paths: Iterable[Path]) -> str:
    """Of the contents of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\0".encode() + data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _ReadUnit:
    place: int
    unit: Unit


@dataclass(frozen=True, slots=True)
class _Read:
    units: list[_ReadUnit]
    results: list[tuple[UnitRows, bytes]] | None
    seconds: float = 0.0


def _read_units(
    source: SourceOptions, folder: Path, taxonomy: Path | None, units: list[_ReadUnit]
) -> _Read:
    """In a worker."""
    started = time.perf_counter()
    terms = worker_taxonomy(taxonomy)
    results = []
    for task in units:
        result = read_unit(source, task.unit, folder=folder, taxonomy=terms)
        results.append((rows_of(result), stamp(source.root, task.unit, result.files)))
    return _Read(units, results, time.perf_counter() - started)


def _worker_died(units: list[_ReadUnit]) -> _Read:
    return _Read(units, None)


class _Reading:
    """The units of a source, those that are done and those that are read, in their order."""

    def __init__(self, source: SourceOptions, number: int, store: Store) -> None:
        self.source = source
        self.number = number
        self.store = store
        self.size = 1
        self.done: deque[tuple[int, int]] = deque()

    def tasks(self) -> Iterator[list[_ReadUnit]]:
        """What is to be read, some units together; those that are done go to ``done``."""
        waiting: list[_ReadUnit] = []
        module = readers.load(self.source.reader)  # type: ignore[attr-defined]
        for place, unit in enumerate(module.units(self.source)):
            known = self.store.known_unit(self.number, unit.key)
            if known is not None and known[1] == stamp(self.source.root, unit, known[2]):
                self.done.append((known[0], place))
                continue
            waiting.append(_ReadUnit(place, unit))
            if len(waiting) >= self.size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def done_before(self, place: float) -> Iterator[tuple[int, int]]:
        while self.done and self.done[0][1] < place:
            yield self.done.popleft()


def _read(
    job: Job,
    source: SourceOptions,
    store: Store,
    engine: Executor,
    limit: int | None,
    progress: Progress,
) -> None:
    number = next(number for number, name in store.sources() if name == source.name)
    reading = _Reading(source, number, store)
    function = partial(_read_units, source, job.output, job.taxonomy)
    progress.stage(f"reading {source.name}")
    store.begin_order()
    twins: set[bytes] = set()

    def enough(units: Iterable[tuple[int, int]]) -> bool:
        """Whether the limit is reached with these units, which get their places."""
        for unit, place in units:
            store.order([(unit, place)])
            if limit is not None:
                twins.update(store.twins(unit))
                if len(twins) >= limit:
                    return True
        return False

    results = engine.map(function, reading.tasks(), died=_worker_died)
    full = limit is not None and limit < 1
    with contextlib.closing(_each(results, function, engine)) as units:
        for task, (result, mark), seconds, count in units:
            if full or (full := enough(reading.done_before(task.place))):
                break
            unit = store.add_unit(number, task.unit.key, mark, result)
            progress.advance(records=len(result.rows))
            if full := enough([(unit, task.place)]):
                break
            # A task grows until it takes long enough; that changes no result.
            if seconds < _TASK_SECONDS / 2:
                reading.size = min(max(reading.size, 2 * count), _MOST_UNITS)
            elif seconds > 2 * _TASK_SECONDS:
                reading.size = max(1, count // 2)
    if not full:
        enough(reading.done_before(float("inf")))
    store.arrange(number, limit=limit)


def _each(
    results: Iterator[_Read], function: Callable[[list[_ReadUnit]], _Read], engine: Executor
) -> Generator[tuple[_ReadUnit, tuple[UnitRows, bytes], float, int], None, None]:
    """Unit by unit. Where a worker died over several, each is tried alone to find the one."""
    try:
        for read in results:
            if read.results is None and len(read.units) > 1:
                alone = engine.map(function, ([task] for task in read.units), died=_worker_died)
                yield from _each(alone, function, engine)
            elif read.results is None:
                (task,) = read.units
                detail = "a library crashed, or the system ended the process for its memory"
                drop = Drop("read", "the reading process died", task.unit.key, detail)
                yield task, (UnitRows([], (drop,), 1), b"died"), 0.0, 1
            else:
                count = len(read.units)
                for task, result in zip(read.units, read.results, strict=True):
                    yield task, result, read.seconds, count
    finally:
        close = getattr(results, "close", None)
        if close is not None:
            close()


# What `store_image` writes, whole or aside; anything else in the folder is somebody's and stays.
_STORED = re.compile(r"/[0-9a-f]{2}/\.?[0-9a-f]{32}")


def _compare(store: Store, folder: Path, *, delete: bool = False) -> bool:
    """Whether pictures of records were missing, whose units are now unread.

    Args:
        store: of the job.
        folder: of the pictures.
        delete: those that no record refers to.
    """
    wanted = iter(store.images())
    missing: list[str] = []
    name = next(wanted, None)
    for found in _pictures(folder):
        while name is not None and name < found:
            missing.append(name)
            name = next(wanted, None)
        if name == found:
            name = next(wanted, None)
        elif delete and _STORED.search(found):
            (folder.parent / found).unlink(missing_ok=True)
    while name is not None:
        missing.append(name)
        name = next(wanted, None)
    for name in missing:
        store.forget_image(name)
    return bool(missing)


def _pictures(folder: Path) -> Iterator[str]:
    """Path below the corpus of every file in its folder of pictures, sorted as text."""
    if not folder.is_dir():
        return
    for shard in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        for name in sorted(entry.name for entry in os.scandir(folder / shard)):
            yield f"{folder.name}/{shard}/{name}"


# --- making ---------------------------------------------------------------------------------------


def source_context(source: SourceOptions, vocabulary: Sequence[str]) -> SourceContext:
    """What is known of a source whose records have these labels."""
    return SourceContext(
        source=source.name,
        dataset=source.dataset or source.name,
        vocabulary=tuple(vocabulary),
        synonyms=dict(source.synonyms),
        chinese=dict(source.chinese),
    )


def making_of(job: Job, context: SourceContext, *, grounded: bool) -> Making:
    """How a source's conversations are made."""
    answers = None
    if job.writer.name != "template":
        answers = _hash(
            fingerprint(job.writer, without=_NOT_OF_ANSWERS),
            fingerprint(job.checks),
            grounded,
            context,
            _taxonomy_digest(job),
            _code(_CODE_OF_TEXT + _CODE_OF_PROMPTS),
        )
    make = make_of(job, context.source)
    return Making(make, job.checks, job.seed, job.taxonomy, context, answers)


def make_of(job: Job, source: str) -> MakeOptions:
    """The section ``make`` as it holds for a source."""
    (own,) = {one.negatives for one in job.sources if one.name == source}
    return job.make if own is None else job.make.model_copy(update={"negatives": own})


def _hash(*parts: Any) -> bytes:
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _taxonomy_digest(job: Job) -> str:
    return "" if job.taxonomy is None else _digest([job.taxonomy])


def _code(patterns: Sequence[str]) -> str:
    files: set[Path] = set()
    for pattern in patterns:
        for path in _PACKAGE.glob(pattern):
            files.update(path.rglob("*.*") if path.is_dir() else [path])
    return _digest(sorted(path for path in files if path.suffix in (".py", ".yaml", ".json")))


def _make(
    job: Job,
    source: SourceOptions,
    number: int,
    store: Store,
    engine: Executor,
    selection: Selection,
    progress: Progress,
) -> None:
    context = source_context(source, store.vocabulary(number))
    making = making_of(job, context, grounded=selection.grounded)
    made = _hash(
        fingerprint(make_of(job, source.name)),
        fingerprint(job.checks),
        job.seed,
        context,
        making.answers,
        _taxonomy_digest(job),
        _code(_CODE_OF_TEXT),
    ).hex()
    progress.stage(f"making {source.name}", total=store.count_to_make(number, made))
    flight: deque[list[Any]] = deque()

    def chunks() -> Iterator[list[Any]]:
        for raws in store.to_make(number, made):
            flight.append(raws)
            yield raws

    for items in engine.map(partial(make, pickle.dumps(making)), chunks()):
        raws = flight.popleft()
        store.add_made(made, zip(raws, items, strict=True))
        progress.advance(len(raws))


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


def _write(job: Job, store: Store, selection: Selection, progress: Progress) -> CorpusError | None:
    """Have pending items written. What stops the writer cleanly is returned."""
    total = store.count_pending()
    if not total or job.writer.name == "template":
        return None
    # They need the libraries of the API.
    from data_tools.writers.models import model_writer

    contexts = contexts_of(job, store)
    writer = model_writer(job, grounded=selection.grounded)
    rows: dict[str, int] = {}
    answered: list[tuple[int, Outcome]] = []

    def tasks() -> Iterator[Task]:
        for row, item, record in store.pending():
            rows[item.id] = row
            yield Task(item, record, contexts[record.provenance.source])

    def keep() -> None:
        with store.transaction():
            for row, outcome in answered:
                _keep(store, row, outcome)
        answered.clear()

    progress.stage("asking the model", total=total)
    last = time.monotonic()
    try:
        for outcome in writer.write(tasks()):
            row = rows.pop(outcome.item.id)
            answered.append((row, outcome))
            progress.advance(dollars=outcome.dollars)
            if time.monotonic() - last > _COMMIT_SECONDS:
                keep()
                last = time.monotonic()
    except CleanStop as stop:
        return stop
    finally:
        keep()
    return None


def contexts_of(job: Job, store: Store) -> dict[str, SourceContext]:
    """By the name of the source."""
    options = {source.name: source for source in job.sources}
    return {
        name: source_context(options[name], store.vocabulary(number))
        for number, name in store.sources()
    }


def _keep(store: Store, row: int, outcome: Outcome) -> None:
    if not outcome.pending:
        store.set_outcome(
            row,
            conversation=outcome.conversation,
            problems=outcome.problems,
            prompt=outcome.prompt,
            answer=outcome.answer,
        )
    store.add_usage(
        requests=outcome.requests,
        cached=outcome.cached,
        prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens,
        dollars=outcome.dollars,
    )
