"""By which names the server may be asked where it has no key to go by."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gmai_xtuner.core.addresses import is_loopback, name_of
from gmai_xtuner.serve.errors import ApiError


class OnlyLoopbackNames:
    """Refuses a request whose ``Host`` is no name of this machine's loopback.

    Any web site could point its own name at 127.0.0.1; its pages, open in a browser on this machine, could
    then ask the model and read the answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        if is_loopback(name_of(f"//{host}")):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            f"without a key this server is asked as 127.0.0.1 or localhost, not as {host[:100]!r}. Start it "
            "with --api-key-env, or with --without-key if everyone may ask",
            status=403,
            code="host_not_allowed",
        )
        await JSONResponse(error.body(), status_code=error.status)(scope, receive, send)
