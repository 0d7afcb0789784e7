# SPDX-License-Identifier: Apache-2.0

"""The writer that uses the Batch API: half the price, answers within a day, collected by a later run.

```
tasks -> answers in the ledger judged -> Outcome
         a batch under way asks it    -> waits for a later run (or for `wait` minutes)
         neither                      -> shard.jsonl -> ledger: prepared -> file: uploaded -> batch: submitted
```
Each arrow to the right of a shard is written down before the next is taken. A run that finds a shard half-way
looks at the server for its file, by name, and its batch, by metadata, before it does anything twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import tempfile
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_tools.writers import asking
from data_tools.writers.asking import BatchesPending, BudgetReached, Outcome, Task
from data_tools.writers.ledger import Account, Expense, Ledger, Reply, Shard
from data_tools.writers.openai_writer import ModelWriter, key_of
from data_tools.writers.options import OpenAIBatchOptions
from data_tools.writers.request import Request, Traits, reason_of, reply_of
from gmai_xtuner.core.errors import CorpusError, EndpointError
from gmai_xtuner.core.http import NO_KEY, RequestRefused, error_of

SHARD = "gmai_xtuner_shard"  # the name of the metadata by which a batch is found again
ABANDONED = 86_400  # seconds after which a file that belongs to no shard is deleted
ENDED = ("completed", "expired", "cancelled", "failed")
# A batch that isn't taken because others are under way; it is to be tried again, and nothing else is wrong.
QUEUE_FULL = ("token_limit_exceeded", "request_limit_exceeded", "batch_limit_exceeded")


class OpenAIBatchWriter(ModelWriter[OpenAIBatchOptions]):
    """Writes conversations by the Batch API."""

    def write(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield the outcomes of the tasks whose answers are there; submit what is missing.

        Raises:
            BatchesPending: batches are under way, after ``wait`` minutes still.
            BudgetReached: nothing is under way and the budget doesn't bear the next request.
            EndpointError: the server refuses files or batches.
            CorpusError: an image or the ledger can't be read.
        """
        with self.ledger() as ledger:
            run = _Run(self, ledger)
            until = time.monotonic() + 60 * self.options.wait
            run.collect()
            waiting = yield from run.walk(iter(tasks))
            try:
                while waiting.count:
                    if not run.collect():
                        if not run.shards:
                            break
                        if time.monotonic() >= until:
                            raise BatchesPending(
                                f"{waiting.count:,} conversations wait for {len(run.shards)} batches at "
                                f"{self.options.base_url}; run the job again to collect them."
                            )
                        time.sleep(min(self.options.poll, max(0.0, until - time.monotonic())))
                        continue
                    with contextlib.closing(waiting) as before:
                        waiting = yield from run.walk(before.tasks())
                if run.over_budget is not None:
                    raise run.over_budget
                if waiting.count:
                    raise BatchesPending(
                        f"{waiting.count:,} conversations wait: the server has no room for their batches "
                        "now, or another job asks the same. Run the job again later."
                    )
            finally:
                waiting.close()


class _Run:
    """One run's state."""

    def __init__(self, writer: OpenAIBatchWriter, ledger: Ledger) -> None:
        self.writer, self.options, self.ledger = writer, writer.options, ledger
        self.traits = Traits.of(
            self.options, ledger.traits(self.options.base_url, self.options.model)
        )
        self.server = _Server(self.options)
        self.refused: dict[str, Reply] = {}
        self.new: set[str] = set()
        self.learnt: dict[str, str] = {}
        self.over_budget: BudgetReached | None = None
        self.folder = ledger.path.with_name(ledger.path.name + ".shards")
        self.folder.mkdir(exist_ok=True)
        self._resume()
        self.shards = ledger.shards(self.options.base_url)

    def _resume(self) -> None:
        """Bring shards that a killed run left half-way to where they are in the ledger's eyes."""
        known = self.ledger.all_shards()
        for file in self.folder.glob("*.jsonl"):
            # One that isn't in the ledger is being written by another run, or was when that was killed.
            if file.stem not in known and time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink(missing_ok=True)
        for shard in self.ledger.shards(self.options.base_url):
            if shard.state == "submitted" or self.ledger.is_alive(shard.run):
                continue
            batch_id = self.server.find_batch(shard.id)
            file_id = shard.file_id or self.server.find_file(f"{shard.id}.jsonl")
            if batch_id is not None:
                self.ledger.set_shard(
                    shard.id, "submitted", file_id=file_id or "", batch_id=batch_id
                )
                (self.folder / f"{shard.id}.jsonl").unlink(missing_ok=True)
            elif file_id is not None or (self.folder / f"{shard.id}.jsonl").is_file():
                self._submit(shard.id, file_id)
            else:
                self.ledger.drop_shard(shard.id)

    def walk(self, tasks: Iterator[Task]) -> Generator[Outcome, None, _Spool]:
        """Judge what is answered and submit what nobody asks yet; returns the tasks that wait."""
        account = Account(self.options.budget, self.ledger.spent().total)
        account.reserve(self.ledger.reserved_in_shards())
        self.over_budget = None
        self.traits = Traits.of(self.options, dataclasses.asdict(self.traits) | self.learnt)
        waiting = _Spool()
        shard = _ShardFile(self.folder)
        try:
            for task in tasks:
                found = self._advance(task)
                if isinstance(found, Outcome):
                    yield found
                    continue
                waiting.add(task)
                if found.key in shard.keys or self._asked(found.key):
                    continue
                if self._full() or self.over_budget is not None:
                    continue
                if not account.fits(found.at_most):
                    self.over_budget = self._budget_reached(account, found.at_most)
                    continue
                line = self._line(found)
                if len(line) > self.options.max_bytes:
                    raise CorpusError(
                        f"{task.item.id}: the request has {len(line):,} bytes, a batch may have "
                        f"{self.options.max_bytes:,}; make writer.image.longest_side smaller"
                    )
                if (
                    len(shard.keys) == self.options.max_requests
                    or shard.size + len(line) > self.options.max_bytes
                ):
                    self._send(shard)
                    shard = _ShardFile(self.folder)
                    if self._full():
                        continue
                account.reserve(found.at_most)
                shard.add(found.key, line, found.at_most)
            if shard.keys:
                self._send(shard)
        except BaseException:
            waiting.close()
            raise
        finally:
            shard.discard()
        return waiting

    def _advance(self, task: Task) -> Outcome | Request:
        """As far as the ledger's answers take it: the outcome, or the question that has no answer yet."""
        asked = self.writer.asking(task)
        ask = next(asked)
        while True:
            made = self.writer.request(ask, task)
            reply = self.ledger.answer(made.key) or self.refused.get(made.key)
            if reply is None:
                return made
            if made.key in self.new:
                self.new.discard(made.key)
                reply = dataclasses.replace(reply, new=True)
            try:
                ask = asked.send(reply)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    def _asked(self, key: str) -> bool:
        return self.ledger.in_shard(key) or self.ledger.under_way(key)

    def _full(self) -> bool:
        most = self.options.max_batches
        return most is not None and len(self.shards) >= most

    def _line(self, made: Request) -> bytes:
        request = {
            "custom_id": made.key,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": made.body(self.traits),
        }
        return json.dumps(request, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

    def _send(self, shard: _ShardFile) -> None:
        """Close a shard, write it down, and submit it."""
        shard.finish()
        self.ledger.add_shard(shard.id, self.options.base_url, shard.keys.items())
        shard.kept = True
        self._submit(shard.id, None)
        self.shards = self.ledger.shards(self.options.base_url)

    def _submit(self, shard: str, file_id: str | None) -> None:
        path = self.folder / f"{shard}.jsonl"
        if file_id is None:
            file_id = self.server.upload(path)
        self.ledger.set_shard(shard, "uploaded", file_id=file_id)
        batch_id = self.server.create(file_id, shard)
        self.ledger.set_shard(shard, "submitted", file_id=file_id, batch_id=batch_id)
        path.unlink(missing_ok=True)

    def collect(self) -> int:
        """Take the answers of all batches that have ended; returns how many have."""
        ended = 0
        for shard in self.shards:
            batch = self.server.look(shard)
            if batch["status"] in ENDED:
                ended += self._collect(shard, batch)
        self.shards = self.ledger.shards(self.options.base_url)
        return ended

    def _collect(self, shard: Shard, batch: Mapping[str, Any]) -> bool:
        """All of its answers and its end are one transaction: a kill leaves all of it or none.

        Returns:
            False if the server hadn't room for it, so that trying again at once is of no use.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = [batch[name] for name in ("output_file_id", "error_file_id") if batch.get(name)]
            # All is fetched first: other jobs want to write into the ledger meanwhile.
            files = [self.server.fetch(name, Path(folder) / str(n)) for n, name in enumerate(names)]
            with self.ledger.transaction():
                keys = self.ledger.shard_keys(shard.id)
                for file in files:
                    for line in self.server.lines(file):
                        self._take(line, keys)
                self.ledger.drop_shard(shard.id)
        if batch["status"] == "failed":
            errors = (batch.get("errors") or {}).get("data") or []
            said = "; ".join(str(error.get("message", error)) for error in errors[:3])
            if any(error.get("code") in QUEUE_FULL for error in errors):
                return False
            raise EndpointError(
                f"{self.options.base_url} has refused the batch {batch['id']}: {said or 'no reason'}. "
                "Nothing is lost: check the writer's options and run the job again."
            )
        return True

    def _take(self, line: Mapping[str, Any], keys: Mapping[str, Expense]) -> None:
        """One line of an output or error file: an answer, a refusal, or nothing (to be asked again)."""
        key, response = str(line.get("custom_id")), line.get("response") or {}
        if key not in keys:
            return
        status, body = response.get("status_code"), response.get("body") or {}
        if status == 200 and isinstance(body.get("choices"), list):
            at_most = keys[key]
            reply = reply_of(body, self.options, at_most, discount=self.options.discount)
            self.ledger.settle(key, self.options.model, reply, at_most)
            self.new.add(key)
        elif status in (400, 413, 422):
            refusal = RequestRefused(status, *error_of(body))
            if lesson := self.traits.lesson(refusal, self.options):
                self.ledger.remember(self.options.base_url, self.options.model, **lesson)
                self.learnt |= lesson
            else:
                detail = refusal.message[:500]
                self.refused[key] = Reply(reason_of(refusal), asking.REFUSED, detail)

    def _budget_reached(self, account: Account, at_most: Expense) -> BudgetReached:
        return BudgetReached(
            f"the budget of the job doesn't bear another request of up to {at_most.tokens:,} tokens, "
            f"${at_most.dollars:,.4f}: {account.spent.tokens:,} tokens, ${account.spent.dollars:,.4f} are "
            f"spent over all of its runs and batches under way can cost {account.reserved.tokens:,} tokens, "
            f"${account.reserved.dollars:,.4f}. Nothing is lost: raise writer.budget and run the job again."
        )


class _Server:
    """Files and batches at the server; the client repeats what fails, nothing here costs money."""

    def __init__(self, options: OpenAIBatchOptions) -> None:
        import openai

        self.options = options
        self._key = key_of(options)
        self._errors = openai.APIError
        self.client = openai.OpenAI(
            api_key=self._key or NO_KEY,
            base_url=options.base_url,
            timeout=max(options.timeout, 600),
            max_retries=options.server_retries,
        )

    @contextlib.contextmanager
    def _or_stop(self, what: str) -> Iterator[None]:
        """Turn errors of the client and of parsing into one that says what could not be done."""
        try:
            yield
        except EndpointError:
            raise
        except (self._errors, ValueError) as error:
            said = str(error)
            said = (said.replace(self._key, "[key]") if self._key else said)[:500]
            raise EndpointError(
                f"{self.options.base_url}: {what}: {said}. Nothing is lost: check the writer's options and "
                "run the job again."
            ) from error

    def find_batch(self, shard: str) -> str | None:
        """Return a shard's batch among all that the account has."""
        with self._or_stop("the batches can't be listed"):
            for batch in self.client.batches.list(limit=100):
                if (batch.metadata or {}).get(SHARD) == shard:
                    return batch.id
        return None

    def find_file(self, name: str) -> str | None:
        with self._or_stop("the files can't be listed"):
            for file in self.client.files.list(purpose="batch"):
                if file.filename == name:
                    return file.id
        return None

    def upload(self, path: Path) -> str:
        with self._or_stop("a batch file can't be uploaded"), path.open("rb") as stream:
            return self.client.files.create(file=(path.name, stream), purpose="batch").id

    def create(self, file_id: str, shard: str) -> str:
        """Submit a batch, once: one whose answer was lost is looked for."""
        client = self.client.with_options(max_retries=0)
        with self._or_stop("a batch can't be submitted"):
            try:
                return client.batches.create(
                    input_file_id=file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={SHARD: shard},
                ).id
            except self._errors:
                if (found := self.find_batch(shard)) is not None:
                    return found
                raise

    def look(self, shard: Shard) -> dict[str, Any]:
        with self._or_stop(f"the batch {shard.batch_id} can't be looked at"):
            return self.client.batches.retrieve(shard.batch_id or "").model_dump()

    def fetch(self, file_id: str, path: Path) -> Path:
        """Fetch an output file to the disk: it may have hundreds of megabytes."""
        with (
            self._or_stop(f"the file {file_id} can't be fetched"),
            self.client.files.with_streaming_response.content(file_id) as response,
        ):
            response.stream_to_file(path)
        return path

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the lines of an output file."""
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                with self._or_stop(f"line {number} of a batch's output"):
                    values = json.loads(line)
                    if not isinstance(values, dict):
                        raise ValueError("not an object")
                yield values


class _ShardFile:
    """A batch file that is being written; it exists once it has a line."""

    def __init__(self, folder: Path) -> None:
        self.id = uuid.uuid4().hex
        self.path = folder / f"{self.id}.jsonl"
        self.keys: dict[str, Expense] = {}
        self.size = 0
        self.kept = False
        self._stream: IO[bytes] | None = None

    def add(self, key: str, line: bytes, at_most: Expense) -> None:
        self._stream = self._stream or self.path.open("wb")
        self._stream.write(line)
        self.keys[key] = at_most
        self.size += len(line)

    def finish(self) -> None:
        """Put it on the disk, to stay there."""
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def discard(self) -> None:
        """Delete it, unless a batch is made of it."""
        if self._stream is not None:
            self._stream.close()
        if not self.kept:
            self.path.unlink(missing_ok=True)


class _Spool:
    """Tasks that wait, in a temporary file: there may be a million."""

    def __init__(self) -> None:
        self.count = 0
        self._stream = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()

    def add(self, task: Task) -> None:
        pickle.dump(task, self._stream)
        self.count += 1

    def tasks(self) -> Iterator[Task]:
        self._stream.seek(0)
        return (pickle.load(self._stream) for _ in range(self.count))

    def close(self) -> None:
        self._stream.close()
