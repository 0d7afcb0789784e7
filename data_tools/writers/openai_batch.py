# SPDX-License-Identifier: Apache-2.0

"""The writer that uses the Batch API: half the price, answers within a day, collected by a later run.

```
tasks -> answers in the ledger judged -> Outcome
         a batch under way asks it    -> waits for a later run (or for `wait` minutes)
         neither                      -> ledger: prepared -> shard.jsonl -> file: uploaded -> batch: submitted
```
Each arrow to the right of a shard is written down before the next is taken. A run that finds a shard half-way
looks at the server for its file, by name, and its batch, by metadata, before it does anything twice. A file
that has not left this machine is made anew by a later run, whose sources may be under other rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import tempfile
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.items import Task
from data_tools.options import OpenAIBatchOptions
from data_tools.writers import asking
from data_tools.writers.ledger import Expense, Ledger, Reply, Shard
from data_tools.writers.request import Request, Traits, reason_of, reply_of
from gmai_xtuner.core.agreements import Origin
from gmai_xtuner.core.errors import CorpusError, EndpointError
from gmai_xtuner.core.files import remove_left_behind, replace_text
from gmai_xtuner.core.http import NO_KEY, RequestRefused, error_of
from gmai_xtuner.core.strict_json import STRICT_JSON

SHARD = "gmai_xtuner_shard"  # the name of the metadata by which a batch is found again
ENDED = ("completed", "expired", "cancelled", "failed")
# A batch that isn't taken because others are under way; it is to be tried again, and nothing else is wrong.
QUEUE_FULL = ("token_limit_exceeded", "request_limit_exceeded", "batch_limit_exceeded")


class OpenAIBatchWriter(asking.ModelWriter[OpenAIBatchOptions]):
    """Writes conversations by the Batch API."""

    def write(self, tasks: Iterable[Task]) -> Iterator[asking.Outcome]:
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
                    if run.collect():
                        with contextlib.closing(waiting) as before:
                            waiting = yield from run.walk(before.tasks())
                        continue
                    if not run.shards:
                        break
                    if time.monotonic() >= until:
                        raise asking.BatchesPending(
                            f"{waiting.count:,} conversations wait for {len(run.shards)} batches at "
                            f"{self.options.base_url}; run the job again to collect them."
                        )
                    time.sleep(min(self.options.poll, max(0.0, until - time.monotonic())))
                if run.over_budget is not None:
                    raise run.over_budget
                if waiting.count:
                    raise asking.BatchesPending(
                        f"{waiting.count:,} conversations wait: the server has no room for their batches "
                        "now, or another job asks the same. Run the job again later."
                    )
            finally:
                waiting.close()


class _Run:
    """One run's state."""

    def __init__(self, writer: OpenAIBatchWriter, ledger: Ledger) -> None:
        self.writer, self.options, self.ledger = writer, writer.options, ledger
        self.at = (self.options.base_url, self.options.model)
        self.traits = Traits.of(self.options, ledger.traits(*self.at))
        self.server = _Server(self.options)
        self.refused: dict[str, Reply] = {}
        self.new: set[str] = set()
        self.over_budget: asking.BudgetReached | None = None
        self.folder = ledger.path.with_name(ledger.path.name + ".shards")
        self.folder.mkdir(exist_ok=True)
        for shard in ledger.shards(self.options.base_url):
            if shard.state != "submitted" and not ledger.is_alive(shard.run):
                self._resume(shard)
        self.shards = ledger.shards(self.options.base_url)

    def _resume(self, shard: Shard) -> None:
        """Bring a shard that a killed run left half-way to where it is in the ledger's eyes."""
        path = self.folder / f"{shard.id}.jsonl"
        remove_left_behind(path)
        batch_id = self.server.find_batch(shard.id)
        file_id = shard.file_id or self.server.find_file(path.name)
        if batch_id is not None or file_id is not None:
            self._submit(shard.id, file_id or "", batch_id)
        else:
            self.ledger.drop_shard(shard.id)
            path.unlink(missing_ok=True)

    def _submit(self, shard: str, file_id: str, batch_id: str | None = None) -> None:
        if batch_id is None:
            self.ledger.set_shard(shard, "uploaded", file_id=file_id)
            batch_id = self.server.create(file_id, shard)
        self.ledger.set_shard(shard, "submitted", file_id=file_id, batch_id=batch_id)
        (self.folder / f"{shard}.jsonl").unlink(missing_ok=True)

    def walk(self, tasks: Iterator[Task]) -> Generator[asking.Outcome, None, _Spool]:
        """Judge what is answered and submit what nobody asks yet; returns the tasks that wait."""
        account = asking.Account(self.options, self.ledger.spent())
        account.reserve(self.ledger.reserved_in_shards())
        self.over_budget = None
        waiting = _Spool()
        data, keys, origins = bytearray(), dict[str, Expense](), set[Origin]()
        try:
            for task in tasks:
                found = self._advance(task)
                if isinstance(found, asking.Outcome):
                    yield found
                    continue
                waiting.add(task)
                if found.key in keys or self.ledger.under_way(found.key):
                    continue
                if self._full() or self.over_budget is not None:
                    continue
                if not account.fits(found.at_most):
                    self.over_budget = account.reached(found.at_most)
                    continue
                values: dict[str, Any] = {
                    "custom_id": found.key,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                }
                values["body"] = found.body(self.traits)
                line = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                if len(line) > self.options.max_bytes:
                    raise CorpusError(
                        f"{task.item.id}: the request has {len(line):,} bytes, a batch may have "
                        f"{self.options.max_bytes:,}; make writer.image.longest_side smaller"
                    )
                longer = len(data) + len(line)
                if len(keys) == self.options.max_requests or longer > self.options.max_bytes:
                    self._send(data, keys, origins)
                    data, keys, origins = bytearray(), {}, set()
                    if self._full():
                        continue
                account.reserve(found.at_most)
                data += line
                keys[found.key] = found.at_most
                origins.add(self.writer.origins[found.source])
            if keys:
                self._send(data, keys, origins)
        except BaseException:
            waiting.close()
            raise
        return waiting

    def _advance(self, task: Task) -> asking.Outcome | Request:
        """As far as the ledger's answers take it: the outcome, or the question that has no answer yet."""
        questions = self.writer.questions(task)
        found = asking.step(questions)
        while isinstance(found, Request):
            reply = self.ledger.answer(found.key) or self.refused.get(found.key)
            if reply is None:
                break
            if found.key in self.new:
                self.new.discard(found.key)
                reply = dataclasses.replace(reply, new=True)
            found = asking.step(questions, reply)
        return found

    def _full(self) -> bool:
        most = self.options.max_batches
        return most is not None and len(self.shards) >= most

    def _send(
        self, data: bytearray, keys: Mapping[str, Expense], origins: Iterable[Origin]
    ) -> None:
        """Write a shard down, and submit it."""
        shard = uuid.uuid4().hex
        self.ledger.add_shard(shard, self.options.base_url, keys.items())
        path = self.folder / f"{shard}.jsonl"
        replace_text(path, data)
        self._submit(shard, self.server.upload(path, origins))
        self.shards = self.ledger.shards(self.options.base_url)

    def collect(self) -> int:
        """Take the answers of all batches that have ended; returns how many have."""
        ended = 0
        for shard in self.shards:
            batch = self.server.look(shard)
            if batch["status"] in ENDED:
                ended += self._collect(shard, batch)
        self.shards = self.ledger.shards(self.options.base_url)
        self.traits = Traits.of(self.options, self.ledger.traits(*self.at))
        return ended

    def _collect(self, shard: Shard, batch: Mapping[str, Any]) -> bool:
        """Take all answers and the end in one transaction; False if the server hadn't room for the batch."""
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
            reply = reply_of(body, self.options, keys[key])
            self.ledger.settle(key, self.options.model, reply, keys[key])
            self.new.add(key)
        elif status in (400, 413, 422):
            refusal = RequestRefused(status, *error_of(body))
            if lesson := self.traits.lesson(refusal, self.options):
                self.ledger.remember(*self.at, lesson)
            else:
                self.refused[key] = Reply(reason_of(refusal), asking.REFUSED, refusal.message[:500])


class _Server:
    """Files and batches at the server; the client repeats what fails, nothing here costs money."""

    def __init__(self, options: OpenAIBatchOptions) -> None:
        import openai

        from gmai_xtuner.core.sending import Guard

        self.options = options
        self._guard = Guard(options.base_url)
        self._key = options.key()
        self._errors = openai.APIError
        self.client = openai.OpenAI(
            api_key=self._key or NO_KEY,
            base_url=options.base_url,
            timeout=max(options.timeout, 600),
            max_retries=options.server_retries,
            http_client=self._guard.client(),
        )

    @contextlib.contextmanager
    def _or_stop(self, what: str, origins: Iterable[Origin] = ()) -> Iterator[None]:
        """Turn errors into one that says what could not be done; content goes out of ``origins`` alone."""
        try:
            with self._guard.carrying(origins):
                yield
        except EndpointError:
            raise
        except (self._errors, ValueError) as error:
            said = (str(error).replace(self._key, "[key]") if self._key else str(error))[:500]
            raise EndpointError(
                f"{self.options.base_url}: {what}: {said}. Nothing is lost: check the writer's options and "
                "run the job again."
            ) from error

    def find_batch(self, shard: str) -> str | None:
        """Return a shard's batch among all that the account has."""
        with self._or_stop("the batches can't be listed"):
            listed = self.client.batches.list(limit=100)
            return next((b.id for b in listed if (b.metadata or {}).get(SHARD) == shard), None)

    def find_file(self, name: str) -> str | None:
        with self._or_stop("the files can't be listed"):
            listed = self.client.files.list(purpose="batch")
            return next((file.id for file in listed if file.filename == name), None)

    def upload(self, path: Path, origins: Iterable[Origin]) -> str:
        with self._or_stop("a batch file can't be uploaded", origins), path.open("rb") as stream:
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
                    values = STRICT_JSON.decode(line.decode())
                    if not isinstance(values, dict):
                        raise ValueError("not an object")
                yield values


class _Spool:
    """Tasks that wait, in a temporary file: there may be a million."""

    def __init__(self) -> None:
        self.count = 0
        self._stream = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.close = self._stream.close

    def add(self, task: Task) -> None:
        pickle.dump(task, self._stream)
        self.count += 1

    def tasks(self) -> Iterator[Task]:
        self._stream.seek(0)
        return (pickle.load(self._stream) for _ in range(self.count))
