"""Runtime: what the routes of one running service share; built by `service.app`, reached through the request."""

import asyncio
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from sqlalchemy import Connection
from starlette.requests import ClientDisconnect

from indexer.catalog.entry import Entry
from indexer.catalog.ledger import Also
from perception.policy_file import CalibratedPolicy
from perception.verdict import DecisionPolicy
from service.admission import Admission
from service.audits import Audits
from service.batching import Batcher
from service.books import Books
from service.candidates import Candidates
from service.classifier import Classifier
from service.editing import Editor
from service.engine import Query, Sighting
from service.errors import EditingDisabled, NotReady
from service.explaining import Explainer
from service.jobs import JobRunner
from service.keys import Caller, KeyRing, identify
from service.probing import ProbingDetector
from service.published import Published
from service.rate_limits import RateLimits
from service.settings import Scope, Settings
from service.telemetry import Metrics
from service.webhooks import Event
from service.wire import Model, Policy

T = TypeVar("T")
VOUCHED_FOR = "hardlook.vouched_for"
"""Key of the ASGI scope under which a part of this process names the `Caller` of a request that it makes itself."""


@dataclass
class Runtime:
    """Everything that answers requests.

    Attributes:
        settings: as read at the start.
        model: the encoder, as answers name it.
        policy: how verdicts are made, as answers name it.
        calibrated: the policy together with its audit's figures; None where it is not from a file, and behind a
            defence, which its audit did not have.
        published: the collections.
        rule: the policy itself.
        books: what writes to the catalogue; None where it is turned off.
        jobs: lists of images that nobody waits for; None there too.
        audits: robustness audits that are shown, and tried thresholds on.
        classifier: the use cases.
        explainer: why images get their verdicts.
        admission: bounds of the requests and images in progress.
        batcher: the encoder's queue and replicas.
        keys: of callers.
        anonymous_scopes: what callers without a key may do.
        rate_limits: of callers.
        probing: notices callers who try out how to change an image's verdict.
        metrics: of the whole application.
    """

    settings: Settings
    model: Model
    policy: Policy
    calibrated: CalibratedPolicy | None
    published: Published
    rule: DecisionPolicy
    books: Books | None
    jobs: JobRunner | None
    audits: Audits
    classifier: Classifier
    explainer: Explainer
    admission: Admission
    batcher: Batcher[Query, Sighting]
    keys: KeyRing
    anonymous_scopes: frozenset[Scope]
    rate_limits: RateLimits
    probing: ProbingDetector
    metrics: Metrics

    def answers_coarsely(self, caller: Caller, sha256: bytes, embedding: NDArray[np.float32]) -> bool:
        """Note what a caller sent; whether its answer must be coarse, since the caller tries out how to change it."""
        if caller.anonymous and not self.settings.probing_anonymous:
            return False
        coarse = self.probing.observe(caller.id, sha256, embedding)
        if coarse:
            self.metrics.coarse_answer()
        return coarse

    @property
    def editor(self) -> Editor | None:
        """What changes collections; None where the catalogue is turned off."""
        return None if self.books is None else self.books.editor

    async def settle(self, within_s: float) -> None:
        """Wait until what was answered by now is recorded, for a while; nothing where the catalogue is turned off."""
        if self.books is not None:
            await self.books.recorder.settled(within_s)

    def excuse(self, exemplar_id: str) -> None:
        """Somebody has looked at an exemplar that decides much, and says that it is right to."""
        if self.books is not None and self.books.flood_guard is not None:
            self.books.flood_guard.excuse(exemplar_id)

    def require_editor(self) -> Editor:
        """What changes collections.

        Raises:
            EditingDisabled: the catalogue is turned off.
        """
        if self.books is None:
            raise EditingDisabled
        return self.books.editor

    def require_candidates(self) -> Candidates:
        """Versions and shadows; errors as of `require_editor`."""
        if self.books is None:
            raise EditingDisabled
        return self.books.candidates

    def require_jobs(self) -> JobRunner:
        """What works on jobs; errors as of `require_editor`."""
        if self.jobs is None:
            raise EditingDisabled
        return self.jobs

    def telling(self, event: Event) -> Also | None:
        """What tells webhooks of a change, in the transaction that makes it; nothing where it changes nothing."""
        webhooks = None if self.books is None else self.books.webhooks
        if webhooks is None or not webhooks.wanted(event.type):
            return None

        def tell(connection: Connection, entry: Entry | None) -> None:
            if entry is not None:
                webhooks.enqueue(connection, [event])

        return tell

    @property
    def broken(self) -> bool:
        """Whether nothing can be encoded any more, until the process is restarted."""
        return self.batcher.working == 0


State = Literal["starting", "ready", "draining", "broken"]


def state_of(app: FastAPI) -> State:
    """Where an application is in its life; `ready` says nothing of whether pools are published."""
    if app.state.draining:
        return "draining"
    runtime: Runtime | None = getattr(app.state, "runtime", None)
    if runtime is None:
        return "starting"
    return "broken" if runtime.broken else "ready"


def runtime_of(request: Request) -> Runtime:
    """The runtime that serves a request.

    Raises:
        NotReady: the application has not started.
    """
    runtime: Runtime | None = getattr(request.app.state, "runtime", None)
    if runtime is None:
        raise NotReady("the encoder is being loaded")
    return runtime


async def caller_of(request: Request, scope: Scope | None, images: int = 1) -> Caller:
    """Who asks; the first thing that a route finds out.

    Args:
        request: of which only the headers are read.
        scope: that the caller must have; None where any will do.
        images: that count against its rate limit.

    Raises:
        Unauthenticated, Forbidden, RateLimited: see `service.errors`.
    """
    runtime = runtime_of(request)
    caller: Caller | None = request.scope.get(VOUCHED_FOR)  # nothing that comes over the network can put it there
    if caller is None:
        address = request.client.host if request.client else None
        caller = identify(runtime.keys, request.headers, address, runtime.anonymous_scopes)
    request.state.caller_id = caller.id
    if scope is None:
        caller.require_any()
    else:
        caller.require(scope)
    if images:
        await runtime.rate_limits.hit(caller, images)
    return caller


def actor_of(caller: Caller) -> str:
    """A caller, as the audit log names it: for good, so without the address of those who have no key."""
    return "anonymous" if caller.anonymous else f"key:{caller.id}"


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
