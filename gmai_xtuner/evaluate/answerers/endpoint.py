"""Any OpenAI-compatible server: GPT-4o, vLLM, LMDeploy, SGLang, our own.

Many requests are under way at once. What the server does decides: busy or broken (408, 409, 429, 5xx, a cut
connection) is tried again, after the time that it names; a question that it refuses (400, 413, 422) is
counted and left without an answer; a wrong key, address or model (401, 403, 404) stops the run at once.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from PIL import Image

from gmai_xtuner.core.errors import EvaluationError, ImageError
from gmai_xtuner.evaluate.fingerprint import hash_text
from gmai_xtuner.evaluate.questions import ImageSource, load_image, open_image
from gmai_xtuner.evaluate.store import Given, Job, sorted_jobs

if TYPE_CHECKING:
    from gmai_xtuner.evaluate.answerers import ModelOptions

NO_KEY = "EMPTY"
"""What servers of one's own expect where they check nothing."""
TRY_AGAIN = frozenset({408, 409, 425, 429})
STOP = frozenset({401, 403, 404})
FIRST_REFUSED = 5
"""Requests refused before any answer came: then the request is at fault, not the question."""
GIVEN_UP = 3
"""Questions in a row for which every attempt failed: then the server is at fault."""
LONGEST_WAIT = 600.0
_EXIF_ORIENTATION = 0x0112


class EndpointAnswerer:
    """Asks a server.

    Args:
        options: with ``endpoint``; ``model`` is its name there.

    Raises:
        EvaluationError: the package ``openai`` is not installed.
    """

    def __init__(self, options: ModelOptions) -> None:
        try:
            import openai
        except ImportError as error:
            raise EvaluationError(
                'asking an endpoint needs the package openai: pip install -e ".[evaluate]"'
            ) from error
        self._openai = openai
        self._options = options
        self.name = options.shown
        self.url = str(options.endpoint).rstrip("/")
        # What stands behind a server can't be hashed: its name at its address is all there is.
        self.model = hash_text({"endpoint": self.url, "model": options.model})
        self.generation: Mapping[str, Any] = {
            "endpoint": self.url,
            "model": options.model,
            "temperature": options.temperature,
        }

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        if world_size > 1:
            raise EvaluationError(
                "an endpoint is asked by one process: leave torchrun out and raise --in-flight"
            )
        found: queue.SimpleQueue[Given | BaseException | None] = queue.SimpleQueue()
        run = _Run(self._openai, self._options, self.url, found)
        thread = threading.Thread(target=run.work, args=(sorted_jobs(jobs),), daemon=True)
        thread.start()
        try:
            while (item := found.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield [item]
        finally:
            run.stop()
            thread.join()


class _Run:
    """One run's requests, in an event loop of a thread of its own."""

    def __init__(
        self,
        openai: Any,
        options: ModelOptions,
        url: str,
        found: queue.SimpleQueue[Given | BaseException | None],
    ) -> None:
        self.openai, self.options, self.url, self.found = openai, options, url, found
        self.answered = self.refused = self.given_up = 0
        self.length_name = "max_tokens"
        self.stopping = threading.Event()

    def stop(self) -> None:
        self.stopping.set()

    def work(self, jobs: Sequence[Job]) -> None:
        try:
            asyncio.run(self._work(jobs))
            self.found.put(None)
        except BaseException as error:
            self.found.put(error)

    async def _work(self, jobs: Sequence[Job]) -> None:
        waiting = iter(jobs)
        client = self.openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get(self.options.api_key_env) or NO_KEY,
            max_retries=0,
            timeout=self.options.timeout,
        )
        async with client:

            async def worker() -> None:
                for job in waiting:
                    if self.stopping.is_set():
                        return
                    self.found.put(await self._ask(client, job))

            tasks = [
                asyncio.create_task(worker())
                for _ in range(min(self.options.in_flight, max(1, len(jobs))))
            ]
            watch = asyncio.create_task(self._watch())
            await _all_or_first_error(tasks, watch)
            for task in (*tasks, watch):
                task.cancel()
            ended = await asyncio.gather(*tasks, watch, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _watch(self) -> None:
        while not self.stopping.is_set():
            await asyncio.sleep(0.1)

    async def _ask(self, client: Any, job: Job) -> Given:
        start = time.monotonic()
        try:
            content = await asyncio.to_thread(_content, job)
        except ImageError as error:
            return Given(job, None, 0.0, error.reason, str(error))
        failures = 0
        while True:
            length_name = self.length_name
            try:
                text = await self._request(client, content, {length_name: job.max_new_tokens})
            except self.openai.APIStatusError as error:
                if length_name == "max_tokens" and _wants_the_new_name(error):
                    self.length_name = "max_completion_tokens"
                    continue
                if error.status_code in STOP:
                    raise EvaluationError(self._why_stopped(error)) from error
                if error.status_code not in TRY_AGAIN and error.status_code < 500:
                    return self._refused(job, error)
                why, wait = _told(error), _retry_after(error.response.headers)
            except (
                self.openai.APIConnectionError,
                self.openai.APIResponseValidationError,
            ) as error:
                why, wait = f"{type(error).__name__}: {error.__cause__ or error}", None
            except _NoAnswer as error:
                why, wait = str(error), None
            else:
                self.answered += 1
                self.given_up = 0
                if not _is_text(text):
                    said = text[:200].encode("ascii", "backslashreplace").decode()
                    return Given(job, None, 0.0, "not_text", f"no UTF-8 can hold the reply {said}")
                return Given(job, text, round(time.monotonic() - start, 4))
            failures += 1
            if failures > self.options.retries:
                return self._gave_up(job, why)
            if wait is None:
                wait = min(60.0, 0.5 * 2 ** (failures - 1)) * random.uniform(0.5, 1)
            await asyncio.sleep(min(wait, LONGEST_WAIT))

    async def _request(
        self, client: Any, content: list[dict[str, Any]], options: dict[str, Any]
    ) -> str:
        if self.options.temperature is not None:
            options = {**options, "temperature": self.options.temperature}
        reply = await client.chat.completions.create(
            model=self.options.model, messages=[{"role": "user", "content": content}], **options
        )
        choices = getattr(reply, "choices", None)
        if not choices:
            raise _NoAnswer("the server's reply has no choices")
        message = choices[0].message
        return (message.content or getattr(message, "refusal", None) or "").strip()

    def _refused(self, job: Job, error: Any) -> Given:
        self.refused += 1
        if not self.answered and self.refused >= FIRST_REFUSED:
            raise EvaluationError(
                f"{self.url} has refused the first {self.refused} requests, the last with {_told(error)}. "
                "Does the model take images? Does it take a temperature (--temperature none)?"
            )
        return Given(job, None, 0.0, "refused_by_server", _told(error))

    def _gave_up(self, job: Job, why: str) -> Given:
        self.given_up += 1
        if self.given_up >= GIVEN_UP or not self.answered:
            raise EvaluationError(
                f"{self.url} gives no answer: {1 + self.options.retries} attempts each at "
                f"{self.given_up} questions in a row failed, the last with {why}. "
                "What was answered is kept: run the same command again when the server is well"
            )
        return Given(job, None, 0.0, "server_failed", why)

    def _why_stopped(self, error: Any) -> str:
        advice = {
            401: f"Is the key in the environment variable {self.options.api_key_env} right?",
            403: f"May the key in {self.options.api_key_env} use this model?",
            404: f"Is there a model {self.options.model!r}? Does the URL end as the server wants it, "
            "e.g. in /v1?",
        }[error.status_code]
        return f"{self.url} answers {_told(error)}. {advice}"


async def _all_or_first_error(
    tasks: Sequence[asyncio.Task[None]], watch: asyncio.Task[None]
) -> None:
    """Wait until all workers are done, one has failed, or the run is being stopped."""
    pending: set[asyncio.Task[None]] = {*tasks, watch}
    while pending - {watch}:
        new, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if watch in new or any(task.exception() is not None for task in new):
            return


class _NoAnswer(Exception):
    """The server said yes and nothing else."""


def _wants_the_new_name(error: Any) -> bool:
    """Newer models of OpenAI take ``max_completion_tokens`` alone, and say so."""
    return error.status_code == 400 and "max_completion_tokens" in str(error)


def _told(error: Any) -> str:
    said = error.body.get("message") if isinstance(error.body, dict) else None
    told = " ".join(f"HTTP {error.status_code}: {said or error.message}".split())[:400]
    return told if _is_text(told) else told.encode("ascii", "backslashreplace").decode()


def _is_text(text: str) -> bool:
    """JSON can carry half a surrogate pair, which no file and no request can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait, given as a number or as a date."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds:
            return float(milliseconds) / 1000
        if not value:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _content(job: Job) -> list[dict[str, Any]]:
    """The parts of a user's message.

    Raises:
        ImageError: a picture can't be read.
    """
    urls = [
        data_url(source, f"image {number} of question {job.id}")
        for number, source in enumerate(job.images, 1)
    ]
    coming = iter(urls)
    return [
        {"type": "image_url", "image_url": {"url": next(coming)}}
        if part is None
        else {"type": "text", "text": part}
        for part in job.parts()
    ]


def data_url(source: ImageSource, name: str) -> str:
    """The picture that our own models see, without loss: a plain JPEG as it is, anything else as PNG.

    Raises:
        ImageError: it can't be read.
    """
    content = load_image(source)
    picture = open_image(content, name)
    content = content if isinstance(content, bytes) else content.read_bytes()
    if _is_plain_jpeg(content):
        return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _is_plain_jpeg(content: bytes) -> bool:
    if not content.startswith(b"\xff\xd8"):
        return False
    with Image.open(io.BytesIO(content)) as image:
        return image.mode in ("L", "RGB") and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
