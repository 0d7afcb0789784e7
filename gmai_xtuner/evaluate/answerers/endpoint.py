# SPDX-License-Identifier: Apache-2.0

"""Any OpenAI-compatible server: GPT-4o, vLLM, LMDeploy, SGLang, our own.

Many requests are under way at once. A busy or broken server is asked again, after the time that it names; a
question that it refuses is counted and left without an answer; a server that refuses every request (a wrong
key, address or model) stops the run at once. `core.http` tells these apart.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gmai_xtuner.core import http
from gmai_xtuner.core.agreements import benchmark_origin
from gmai_xtuner.core.errors import EndpointError, EvaluationError, ImageError, is_unicode
from gmai_xtuner.core.imaging.images import opened
from gmai_xtuner.evaluate.answerers import hash_text
from gmai_xtuner.evaluate.questions import ImageSource, load_image, open_image
from gmai_xtuner.evaluate.store import Given, Job, sorted_jobs, split_at_images

if TYPE_CHECKING:
    from gmai_xtuner.evaluate.answerers import ModelOptions

FIRST_REFUSED = 5
"""Requests refused before any answer came: then the request is at fault, not the question."""
GIVEN_UP = 3
"""Questions in a row for which every attempt failed: then the server is at fault."""
LONGEST_WAIT = 600.0
TOP_LOGPROBS = 20
"""Likeliest first tokens that a server is asked for: as many as OpenAI's and vLLM's give."""
_EXIF_ORIENTATION = 0x0112


class EndpointAnswerer:
    """Asks the server of ``options.endpoint``; an ``EvaluationError`` where packages for that are missing."""

    repeats = False

    def __init__(self, options: ModelOptions) -> None:
        try:
            import aiohttp  # noqa: F401
            import openai  # noqa: F401
        except ImportError as error:
            raise EvaluationError(
                f'asking an endpoint needs the package {error.name}: pip install -e ".[evaluate]"'
            ) from error
        self._options = options
        self.name = options.shown
        self.url = str(options.endpoint).rstrip("/")
        self.key = http.key_of(options.api_key_env)
        # What stands behind a server can't be hashed: its name at its address is all there is.
        known_as = (options.moved_from or self.url).rstrip("/")
        identity = {"endpoint": known_as, "model": options.model}
        self.model = hash_text(identity)
        self.generation: Mapping[str, Any] = identity | {"temperature": options.temperature}

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        if world_size > 1:
            raise EvaluationError(
                "an endpoint is asked by one process: leave torchrun out and raise --in-flight"
            )
        from anyio.from_thread import start_blocking_portal

        window = self._options.in_flight
        with start_blocking_portal() as portal:
            run = portal.call(_Run, self._options, self.url, self.key)
            try:
                for given in http.each(portal, run.ask, sorted_jobs(jobs), window=window):
                    yield [given]
            except EndpointError as error:
                raise EvaluationError(str(error)) from error
            finally:
                portal.call(run.server.close)


class _Run:
    def __init__(self, options: ModelOptions, url: str, key: str | None) -> None:
        self.options = options
        shown = options.api_key_env or http.DEFAULT_KEY
        self.server = http.ChatServer(
            url, model=options.model, key=key, key_variable=shown, timeout=options.timeout
        )
        self.answered = self.refused = self.given_up = 0
        self.length_name, self.asks_logprobs = "max_tokens", options.logprobs

    async def ask(self, job: Job) -> Given:
        """Ask one question until it is answered, refused or given up."""
        start = time.monotonic()
        try:
            content = await asyncio.to_thread(_content, job)
        except ImageError as error:
            return Given(job, None, 0.0, error.reason, str(error))
        failures = 0
        while True:
            length_name, logprobs = self.length_name, self.asks_logprobs and bool(job.labels)
            more: dict[str, Any] = {length_name: job.max_new_tokens}
            if logprobs:
                more |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            try:
                text, ended, shares = await self._request(content, more, job)
            except http.RequestRefused as error:
                # Newer models of OpenAI take the other name alone, and say so.
                if length_name == "max_tokens" and "max_completion_tokens" in error.message:
                    self.length_name = "max_completion_tokens"
                    continue
                if logprobs and "logprobs" in error.message:
                    self.asks_logprobs = False
                    continue
                return self._refused(job, error)
            except http.ServerFault as fault:
                failures += 1
                if failures > self.options.retries:
                    return self._gave_up(job, fault)
                wait = http.back_off(failures - 1) if fault.wait is None else fault.wait
                await asyncio.sleep(min(wait, LONGEST_WAIT))
                continue
            self.answered += 1
            self.given_up = 0
            if not is_unicode(text):
                said = text[:200].encode("ascii", "backslashreplace").decode()
                return Given(job, None, 0.0, "not_text", f"no UTF-8 can hold the reply {said}")
            seconds = round(time.monotonic() - start, 4)
            return Given(job, text, seconds, ended=ended, probabilities=shares)

    async def _request(
        self, content: list[dict[str, Any]], options: dict[str, Any], job: Job
    ) -> tuple[str, str, dict[str, float] | None]:
        body: dict[str, Any] = {
            "model": self.options.model,
            "messages": [{"role": "user", "content": content}],
        }
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        reply = await self.server.complete(body | options, [benchmark_origin(job.benchmark)])
        message, ended = http.first_message(reply)
        if message is None:
            raise http.ServerFault("an answer without a choice")
        # ``reasoning_content`` holds thoughts, which are no answer
        said, refusal = http.message_text(message), message.get("refusal")
        if not said and isinstance(refusal, str):
            said, ended = refusal.strip(), "refusal"
        return self.server.redacted(said), ended, label_shares(reply, job.labels)

    def _refused(self, job: Job, error: http.RequestRefused) -> Given:
        self.refused += 1
        if not self.answered and self.refused >= FIRST_REFUSED:
            raise EvaluationError(
                f"{self.server.url} has refused the first {self.refused} requests, the last with {error}. "
                "Does the model take images? Does it take a temperature (--temperature none), and answers of "
                f"{job.max_new_tokens} tokens (--max-new-tokens)?"
            )
        return Given(job, None, 0.0, "refused_by_server", str(error))

    def _gave_up(self, job: Job, fault: http.ServerFault) -> Given:
        self.given_up += 1
        if self.given_up >= GIVEN_UP or not self.answered:
            raise EvaluationError(
                f"{self.server.url} gives no answer: {1 + self.options.retries} attempts each at "
                f"{self.given_up} questions in a row failed, the last with {fault}. "
                "What was answered is kept: run the same command again when the server is well"
            )
        return Given(job, None, 0.0, "server_failed", str(fault))


def label_shares(reply: Mapping[str, Any], labels: Sequence[str]) -> dict[str, float] | None:
    """Return label -> its share of the labels' probability, by the reply's ``logprobs`` of its first token.

    None where there are none, or where the first token is no label.
    """
    try:
        first = reply["choices"][0]["logprobs"]["content"][0]
        likely = [(one["token"].strip(), float(one["logprob"])) for one in first["top_logprobs"]]
        said = first["token"].strip()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    found = dict.fromkeys(labels, 0.0)
    for token, logprob in likely:
        if token in found:
            found[token] += math.exp(min(logprob, 0.0))
    total = sum(found.values())
    if said not in found or not total > 0:
        return None
    return {label: round(value / total, 6) for label, value in found.items()}


def _content(job: Job) -> list[dict[str, Any]]:
    """Return the parts of a user's message; an ``ImageError`` where an image can't be read."""
    places = enumerate(job.images, 1)
    urls = iter([data_url(source, f"image {n} of question {job.id}") for n, source in places])
    parts = split_at_images(job.prompt, len(job.images))
    return [
        {"type": "image_url", "image_url": {"url": next(urls)}}
        if one is None
        else {"type": "text", "text": one}
        for one in parts
    ]


def data_url(source: ImageSource, name: str) -> str:
    """Return the image that our own models see, without loss: a plain JPEG as it is, anything else as PNG."""
    content = load_image(source)
    image = open_image(content, name)
    content, kind = content if isinstance(content, bytes) else content.read_bytes(), "jpeg"
    if not _is_plain_jpeg(content):
        out, kind = io.BytesIO(), "png"
        image.save(out, "PNG")
        content = out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _is_plain_jpeg(content: bytes) -> bool:
    if not content.startswith(b"\xff\xd8"):
        return False
    with opened(content) as image:
        return image.mode in ("L", "RGB") and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
