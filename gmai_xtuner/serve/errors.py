# SPDX-License-Identifier: Apache-2.0

"""What a client is told, in the form of the OpenAI API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is not answered.

    Args:
        message: what was expected, what came, and what to do.
        status: of HTTP.
        code: short stable name of the kind of error.
        param: which field of the request it is about.
        retry_after: seconds after which to come again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """As the API has it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }
