"""Runtime: what the routes of one running service share; built by `service.app`, reached through the request."""

import asyncio
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.requests import ClientDisconnect

from perception.policy_file import CalibratedPolicy
from service.admission import Admission
from service.classifier import Classifier
from service.errors import NotReady
from service.published import Published
from service.schemas import Model, Policy
from service.settings import Settings

T = TypeVar("T")


@dataclass
class Runtime:
    """Everything that answers requests.

    Attributes:
        settings: as read at the start.
        model: the encoder, as answers name it.
        policy: how verdicts are made, as answers name it.
        calibrated: the policy together with its audit's figures; None where it is not from a file.
        published: the snapshots.
        classifier: the use cases.
        admission: bound of the requests in progress.
        draining: set when the service is asked to stop: it answers what still comes, and is no longer ready.
    """

    settings: Settings
    model: Model
    policy: Policy
    calibrated: CalibratedPolicy | None
    published: Published
    classifier: Classifier
    admission: Admission
    draining: bool = False


def runtime_of(request: Request) -> Runtime:
    """The runtime that serves a request.

    Raises:
        NotReady: the application has not started.
    """
    runtime = getattr(request.app.state, "runtime", None)
    if runtime is None:
        raise NotReady("the service has not started")
    return cast(Runtime, runtime)


def request_id_of(request: Request) -> str:
    """The id of a request, from `service.request_log`."""
    return str(request.state.request_id)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, and cancel it when the caller hangs up. The body must have been read.

    Raises:
        ClientDisconnect: the caller has gone.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request))
    both: list[Awaitable[Any]] = [task, watcher]
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
