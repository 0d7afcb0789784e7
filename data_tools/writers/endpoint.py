"""The server: one request by the ``openai`` client, and what its failures mean.

The client's own retries are off, so that each request is counted, paced and paid for by the loop above.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_tools.writers.limits import retry_after
from data_tools.writers.options import OpenAIOptions
from data_tools.writers.outcome import Reply
from data_tools.writers.payload import MAX_TOKENS_NAMES, STRUCTURES, Traits
from data_tools.writers.prices import expense
from gmai_xtuner.core.errors import EndpointError

if TYPE_CHECKING:
    import httpx2

# 429s that no waiting mends.
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
CONTENT_FILTER = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")
TOO_LONG = ("context_length_exceeded", "maximum context length", "max_model_len", "context window")
# Words by which servers say that they don't know JSON schemas (OpenAI, Azure, vLLM, llama.cpp, TGI, Ollama).
SCHEMA_WORDS = (
    "response_format",
    "json_schema",
    "json_object",
    "structured output",
    "guided",
    "grammar",
)


class ServerFault(Exception):
    """The server failed; the same request may succeed later.

    Args:
        reason: the same for all of the kind.
        detail: what came.
        wait: seconds that the server asks for.
        billed: whether it may have cost something.
        throttled: the server has too much to do, the request itself hasn't failed.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        wait: float | None = None,
        billed: bool = False,
        throttled: bool = False,
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.wait = reason, detail, wait
        self.billed, self.throttled = billed, throttled


class RequestRefused(Exception):
    """The server doesn't take this request, whenever it is sent."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class NotUnderstood(Exception):
    """The server doesn't know how something was asked for; ``traits`` is what to remember of it."""

    def __init__(self, traits: dict[str, str]) -> None:
        super().__init__(str(traits))
        self.traits = traits


class Endpoint:
    """A Chat Completions server; to be made and used in one event loop.

    Raises:
        EndpointError: the environment has no key.
    """

    def __init__(self, options: OpenAIOptions) -> None:
        import openai

        self.options = options
        self._key = key_of(options)
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=options.base_url,
            max_retries=0,
            timeout=options.timeout,
            # A third of httpx' processor time: see benchmarks/README.md.
            http_client=openai.DefaultAioHttpClient(),
        )

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, body: Mapping[str, Any], traits: Traits) -> Reply:
        """Send one request and wait for its answer.

        Raises:
            ServerFault: see there.
            RequestRefused: see there.
            NotUnderstood: see there; ``traits`` were what ``body`` was made for.
            EndpointError: the server refuses every request.
        """
        import httpx2
        import openai

        timeout = self.options.timeout
        try:
            # The client's own time-out starts anew with each piece of the answer.
            async with asyncio.timeout(timeout):
                response = await self._client.post(
                    "/chat/completions", cast_to=httpx2.Response, body=dict(body)
                )
        except openai.APIStatusError as error:
            self._classify(error.response, traits)
        except (TimeoutError, openai.APIConnectionError) as error:
            raise self._lost(error) from error
        return self._read(response)

    def _lost(self, error: Exception) -> ServerFault:
        """What it means that no answer came.

        The client's transport takes cut and refused connections for time-outs alike, so that only the
        exceptions that it began with say whether the request has left this machine.
        """
        import aiohttp

        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        said = self.clean(str(chain[-1]) or type(chain[-1]).__name__)
        unsent = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
        if any(isinstance(cause, unsent) for cause in chain):
            return ServerFault("no connection", said)
        if any(isinstance(cause, TimeoutError) for cause in chain):
            return ServerFault(
                "no answer in time", f"after {self.options.timeout:g} s", billed=True
            )
        return ServerFault("connection cut", said, billed=True)

    def _read(self, response: httpx2.Response) -> Reply:
        """The reply in a body of status 200."""
        try:
            values = json.loads(response.content)
            choices = values.get("choices")
            if not isinstance(choices, list) or ("error" in values and not choices):
                raise ValueError("no list of choices")
        except (ValueError, AttributeError) as error:
            text = self.clean(response.content[:300].decode("utf-8", "replace"))
            raise ServerFault("an answer that isn't the API's", text, billed=True) from error
        return reply_of(values, self.options)

    def _classify(self, response: httpx2.Response, traits: Traits) -> None:
        """Raise what a status other than 2xx means."""
        status, options = response.status_code, self.options
        try:
            code, message = error_of(json.loads(response.content))
        except ValueError:
            code, message = "", response.content[:300].decode("utf-8", "replace").strip()
        message = self.clean(message)
        said = f"{status}: {message}" if message else str(status)
        if status == 429 and code not in NO_MONEY:
            wait = retry_after(response.headers)
            raise ServerFault("too many requests", said, wait=wait, throttled=True)
        if status in (408, 409, 425) or status >= 500:
            wait = retry_after(response.headers)
            raise ServerFault(f"server error {status}", message, wait=wait, throttled=status == 503)
        if status in (400, 413, 415, 422):
            raise meaning_of_400(code, message, traits, options)
        where = f"{options.base_url} (model {options.model})"
        match status:
            case 401:
                what = (
                    f"set {options.key_variable} to a valid key"
                    if options.key_variable
                    else ("name the environment variable that holds the key in writer.key_variable")
                )
            case 403:
                what = "this key may not use this model or this server"
            case 402 | 429:
                what = "the account has no money left; charge it and run the job again"
            case 404:
                what = "check writer.model and writer.base_url (it usually ends in /v1)"
            case _:
                what = "check writer.base_url"
        raise EndpointError(f"{where} refuses every request, {said}; {what}. Nothing is lost.")

    def clean(self, text: str) -> str:
        """Without the key, which some servers repeat, and not too long."""
        text = text.replace(self._key, "[key]") if len(self._key) > 3 else text
        return re.sub(r"\bsk-\S+", "[key]", text)[:500]


def key_of(options: OpenAIOptions) -> str:
    """The key in the environment.

    Raises:
        EndpointError: there is none.
    """
    if options.key_variable is None:
        return "none"
    key = os.environ.get(options.key_variable, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {options.key_variable} is empty or not set; set it to the key for "
            f"{options.base_url}, or write key_variable: null if that server needs none"
        )
    return key


def reply_of(values: Mapping[str, Any], options: OpenAIOptions, *, discount: float = 1.0) -> Reply:
    """A Chat Completions answer as a reply.

    Where the server doesn't count tokens, ``prompt_tokens`` and ``completion_tokens`` are -1: the caller
    counts them at their most.
    """
    usage = values.get("usage") or {}
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt_tokens, int) or not isinstance(completion_tokens, int):
        prompt_tokens = completion_tokens = -1
        dollars = 0.0
    else:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        dollars = expense(
            prompt_tokens, completion_tokens, options.price, cached_tokens=cached, discount=discount
        ).dollars
    choices = values.get("choices") or []
    message = choices[0].get("message") if choices and isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        return Reply("", "no choice", "", prompt_tokens, completion_tokens, dollars)
    text, refusal = message.get("content"), message.get("refusal")
    return Reply(
        text if isinstance(text, str) else "",
        str(choices[0].get("finish_reason") or "stop"),
        refusal if isinstance(refusal, str) else "",
        prompt_tokens,
        completion_tokens,
        dollars,
    )


def error_of(values: Any) -> tuple[str, str]:
    """Code in lower case and message of an error's body, whatever its form."""
    error = values.get("error", values) if isinstance(values, dict) else values
    if not isinstance(error, dict):
        return "", str(error)
    message = error.get("message") or error.get("detail") or values
    parameter = error.get("param")
    text = message if isinstance(message, str) else json.dumps(message)
    if isinstance(parameter, str) and parameter not in text:
        text += f" ({parameter})"
    return str(error.get("code") or error.get("type") or "").lower(), text


def meaning_of_400(code: str, message: str, traits: Traits, options: OpenAIOptions) -> Exception:
    """`NotUnderstood` or `RequestRefused`."""
    text = f"{code} {message}".lower()
    if any(word in text for word in CONTENT_FILTER):
        return RequestRefused("request held back by the server's content filter", message)
    if any(word in text for word in TOO_LONG):
        return RequestRefused("prompt too long for the model", message)
    here = STRUCTURES.index(traits.structured)
    if (
        traits.structured != STRUCTURES[-1]
        and options.structured == "auto"
        and any(word in text for word in SCHEMA_WORDS)
    ):
        return NotUnderstood({"structured": STRUCTURES[here + 1]})
    other = next(name for name in MAX_TOKENS_NAMES if name != traits.max_tokens_name)
    if options.max_tokens_name == "auto" and traits.max_tokens_name in text:
        return NotUnderstood({"max_tokens_name": other})
    return RequestRefused("request refused by the server", message)
