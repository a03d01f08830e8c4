"""Shedding: what is going to be refused for lack of room or time is refused before anything is done for it.

Under overload most requests end so; whatever one of them costs is taken from those that are answered. Whether the
caller has a key is not looked at: the answer tells nothing but that the service is busy.
"""

from typing import cast

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unavailable
from service.problems import problem_response
from service.runtime import Runtime

_PATHS = frozenset({"/classify", "/similar", "/explain", "/v1/moderations", "/adapters/pict-rs"})


class Shedding:
    """ASGI middleware, to be put right within `service.request_log.RequestLog`.

    Args:
        app: what answers the others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        refusal = _refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            scope["endpoint"] = None  # a route that exists, for log and metrics, although nobody looked for it
            await refusal(scope, receive, send)


def _refusal(scope: Scope) -> Response | None:
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _PATHS:
        return None
    runtime = cast(Runtime | None, getattr(scope["app"].state, "runtime", None))
    if runtime is None:
        return None
    try:
        runtime.admission.require_room()
    except Unavailable as error:
        return problem_response(error, scope["state"]["request_id"])
    return None
