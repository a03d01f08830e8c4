"""The synchronous and the asynchronous client. They differ in how they send and wait, and in nothing else."""

import asyncio
import ssl
import time
from abc import ABC, abstractmethod
from typing import Any, Generic, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, SecretStr

from service.client.answers import Reply
from service.client.audit import Audit
from service.client.audit_runs import AuditRuns
from service.client.calls import Call, classify_call, pools_call, ready_call, similar_call
from service.client.carriers import AwaitingCarrier, BlockingCarrier
from service.client.collections import Collections
from service.client.connection import Connection, failure, receiving, request_arguments
from service.client.curation import Curation
from service.client.errors import AnswerNotUnderstood, ConnectionFailed, HardlookError, Unavailable
from service.client.exchange import MAX_ATTEMPTS, Failure, RetryRules, Send, exchange
from service.client.explaining import Explaining
from service.client.images import Images, load_images
from service.client.jobs import Jobs
from service.client.kept_images import KeptImages
from service.client.parts import Awaiting, Blocking
from service.client.reviews import Reviews, feedback_call
from service.client.versions import Shadow, Versions
from service.wire import ClassifyAnswer, PoolsAnswer, SimilarAnswer
from service.wire_reviews import FeedbackAnswer

AnswerT = TypeVar("AnswerT", bound=BaseModel)
TransportT = TypeVar("TransportT")
Pool = Literal["safe", "buffer", "unsafe"]
Wrong = Literal["false-positive", "false-negative"]
_MIB = 1024 * 1024
MAX_IMAGE_BYTES = 64 * _MIB
MAX_ANSWER_BYTES = 64 * _MIB
_GATEWAY_STATUSES = (502, 503, 504)


class _Client(ABC, Generic[TransportT]):
    """What both clients are given.

    Args:
        base_url: of the service, such as 'http://127.0.0.1:8000'; routes are looked for below its path.
        api_key: sent as `Authorization: Bearer`; in no repr, log line or exception.
        timeout_s: for one call, with all its attempts and the pauses between them; a file that is written to a disk
            may take longer, as long as it keeps coming.
        max_attempts: 1 to 999. Sent again after 429, 502, 503 and failed connections; what would come to something else
            when done twice only where the service says, or cannot but mean, that it was not done.
        max_image_bytes: of one image; more is not sent.
        max_answer_bytes: of one answer; more is not read. Files that are written to a disk have no bound.
        trust_env: use the proxies and certificates that HTTPS_PROXY, SSL_CERT_FILE and the like name. Off by default:
            images and keys go to the service that was named, and to nobody in between.
        ssl_context: for certificates of one's own.
        transport: of httpx, in place of the network; for tests.

    Raises:
        ValueError: one is out of range.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_attempts: int = 5,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        trust_env: bool = False,
        ssl_context: ssl.SSLContext | None = None,
        transport: TransportT | None = None,
    ) -> None:
        self.base_url = base_url
        secret = None if api_key is None else SecretStr(api_key)
        self._rules, self._once = RetryRules(timeout_s, max_attempts), RetryRules(timeout_s, max_attempts=1)
        self._patient = RetryRules(timeout_s, MAX_ATTEMPTS)
        self._max_image_bytes, self._max_answer_bytes = max_image_bytes, max_answer_bytes
        self._open(transport=transport, **Connection(base_url, secret, trust_env, ssl_context).arguments())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    @abstractmethod
    def _open(self, **arguments: Any) -> None:
        """Open connections with the arguments of an httpx client."""

    def _classify_call(self, images: Images, k: int | None) -> Call[ClassifyAnswer]:
        return classify_call(load_images(images, self._max_image_bytes), k)

    def _similar_call(self, images: Images | None, text: str | None, **parameters: Any) -> Call[SimilarAnswer]:
        loaded = None if images is None else load_images(images, self._max_image_bytes)
        return similar_call(loaded, text, **parameters)


class HardlookClient(_Client[httpx.BaseTransport]):
    """Asks a hardlook service. Threads may share one.

        with HardlookClient("http://127.0.0.1:8000") as client:
            verdict = client.classify(Path("photo.jpg")).results[0].verdict

    Its parts `collections`, `versions`, `shadow`, `curation`, `reviews`, `images`, `jobs`, `audit` and `audits` are
    described in their modules. What they list is iterated over, and asked for as it is needed.

    The timeout is checked whenever a piece of an answer arrives, so that a server that trickles the head of its answer
    can exceed it; the asynchronous client has no such exception.
    """

    def _open(self, **arguments: Any) -> None:
        self._http = httpx.Client(**arguments)
        carrier = BlockingCarrier(self._carry, self._max_image_bytes)
        self.collections: Collections[Blocking] = Collections(carrier)
        self.versions: Versions[Blocking] = Versions(carrier)
        self.shadow: Shadow[Blocking] = Shadow(carrier)
        self.reviews: Reviews[Blocking] = Reviews(carrier)
        self.images: KeptImages[Blocking] = KeptImages(carrier)
        self.jobs: Jobs[Blocking] = Jobs(carrier)
        self.audit: Audit[Blocking] = Audit(carrier)
        self.audits: AuditRuns[Blocking] = AuditRuns(carrier)
        self.curation: Curation[Blocking] = Curation(carrier)
        self.explain = Explaining[Blocking](carrier).explain

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections; it cannot be used afterwards."""
        self._http.close()

    def classify(self, images: Images, k: int | None = None, *, request_id: str | None = None) -> ClassifyAnswer:
        """Ask whether images are safe.

        Args:
            images: one, or a list or tuple of several (at most HARDLOOK_MAX_IMAGES_PER_REQUEST of the service). Each
                is bytes, a Path, a file in binary mode or a `Url`, alone or in a pair (id, image).
            k: neighbours of each pool to show.
            request_id: 1 to 60 of A-Z a-z 0-9 . _ -, to find the request in the service's log; random by default.

        Returns:
            A result for each image, in order, under its id: the given one, else the name of the file, else the
            position. Of several images some may be an `ItemError`; the error of an only one is raised.

        Raises:
            ImageUnreadable: an image cannot be read here.
            ConnectionFailed, AnswerNotUnderstood, ProblemError: no verdict; see `service.client.errors`.
            TypeError, ValueError: an argument that is not of these.
        """
        return self._ask(self._classify_call(images, k), request_id)

    def similar(
        self,
        images: Images | None = None,
        *,
        text: str | None = None,
        gallery: str | None = None,
        pool: Pool | None = None,
        k: int | None = None,
        min_similarity: float | None = None,
        request_id: str | None = None,
    ) -> SimilarAnswer:
        """Ask for the exemplars that are most similar to images or to a text.

        Args:
            images: as of `classify`; None with a text.
            text: what they should show; needs an encoder with a text tower.
            gallery: collection to search; the moderation pools by default.
            pool: search this one of the moderation pools alone; not together with `gallery`.
            k: the most neighbours.
            min_similarity: leave out what is less similar; cosine in [-1, 1].
            request_id: as of `classify`.

        Raises:
            The same as `classify`.
        """
        parameters = {"gallery": gallery, "pool": pool, "k": k, "min_similarity": min_similarity}
        return self._ask(self._similar_call(images, text, **parameters), request_id)

    def pools(self) -> PoolsAnswer:
        """Ask what is published.

        Raises:
            ConnectionFailed, AnswerNotUnderstood, ProblemError: see `service.client.errors`.
        """
        return self._ask(pools_call())

    def is_ready(self) -> bool:
        """Ask, once, whether the service can classify; False as well where nothing answers.

        Raises:
            AnswerNotUnderstood, ProblemError: something else than this service answers.
        """
        try:
            self._ask(ready_call(), rules=self._once)
        except HardlookError as error:
            if not _means_not_ready(error):
                raise
            return False
        return True

    def feedback(
        self,
        kind: Wrong,
        *,
        request_id: str | None = None,
        sha256: str | None = None,
        comment: str = "",
    ) -> FeedbackAnswer:
        """Report that a verdict was wrong; a person will look at it.

        It is not sent again where it may have been heard: every report counts.

        Args:
            kind: what the verdict was: a 'false-positive' should have been `safe`, a 'false-negative' `unsafe`.
            request_id: of the answer with the verdict.
            sha256: of the image file, in hex; needed where the request had several images, or in place of its id.
            comment: for the reviewer.

        Raises:
            ConnectionFailed, AnswerNotUnderstood, ProblemError: NotFound where the verdict is not kept any more.
            ValueError: an argument that is not of these.
        """
        return self._ask(feedback_call(kind, request_id, sha256, comment))

    def _carry(self, call: Call[AnswerT], patient: bool) -> AnswerT:
        return self._ask(call, rules=self._patient if patient else None)

    def _ask(self, call: Call[AnswerT], request_id: str | None = None, *, rules: RetryRules | None = None) -> AnswerT:
        steps = exchange(call, rules or self._rules, request_id)
        outcome: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                answer: AnswerT = stop.value
                return answer
            if isinstance(step, Send):
                outcome = self._send(call, step)
            else:
                time.sleep(step.seconds)
                outcome = None

    def _send(self, call: Call[AnswerT], step: Send) -> Reply | Failure:
        until_s = time.monotonic() + step.timeout_s
        try:
            with (
                self._http.stream(**request_arguments(call, step)) as response,
                receiving(call, response, self._max_answer_bytes, until_s) as body,
            ):
                for chunk in response.iter_raw():
                    if not body.add(chunk):
                        break
                return body.reply(response)
        except httpx.TransportError as error:
            return failure(error)


class AsyncHardlookClient(_Client[httpx.AsyncBaseTransport]):
    """Asks a hardlook service, on asyncio; otherwise as `HardlookClient`, which describes every method.

    async with AsyncHardlookClient("http://127.0.0.1:8000") as client:
        answer = await client.classify(Path("photo.jpg"))

    Files are read and written in threads. The methods of its parts are awaited, or iterated over with `async for`.
    """

    def _open(self, **arguments: Any) -> None:
        self._http = httpx.AsyncClient(**arguments)
        carrier = AwaitingCarrier(self._carry, self._max_image_bytes)
        self.collections: Collections[Awaiting] = Collections(carrier)
        self.versions: Versions[Awaiting] = Versions(carrier)
        self.shadow: Shadow[Awaiting] = Shadow(carrier)
        self.reviews: Reviews[Awaiting] = Reviews(carrier)
        self.images: KeptImages[Awaiting] = KeptImages(carrier)
        self.jobs: Jobs[Awaiting] = Jobs(carrier)
        self.audit: Audit[Awaiting] = Audit(carrier)
        self.audits: AuditRuns[Awaiting] = AuditRuns(carrier)
        self.curation: Curation[Awaiting] = Curation(carrier)
        self.explain = Explaining[Awaiting](carrier).explain

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections; it cannot be used afterwards."""
        await self._http.aclose()

    async def classify(self, images: Images, k: int | None = None, *, request_id: str | None = None) -> ClassifyAnswer:
        """As `HardlookClient.classify`."""
        return await self._ask(await asyncio.to_thread(self._classify_call, images, k), request_id)

    async def similar(
        self,
        images: Images | None = None,
        *,
        text: str | None = None,
        gallery: str | None = None,
        pool: Pool | None = None,
        k: int | None = None,
        min_similarity: float | None = None,
        request_id: str | None = None,
    ) -> SimilarAnswer:
        """As `HardlookClient.similar`."""
        parameters = {"gallery": gallery, "pool": pool, "k": k, "min_similarity": min_similarity}
        call = await asyncio.to_thread(self._similar_call, images, text, **parameters)
        return await self._ask(call, request_id)

    async def pools(self) -> PoolsAnswer:
        """As `HardlookClient.pools`."""
        return await self._ask(pools_call())

    async def is_ready(self) -> bool:
        """As `HardlookClient.is_ready`."""
        try:
            await self._ask(ready_call(), rules=self._once)
        except HardlookError as error:
            if not _means_not_ready(error):
                raise
            return False
        return True

    async def feedback(
        self,
        kind: Wrong,
        *,
        request_id: str | None = None,
        sha256: str | None = None,
        comment: str = "",
    ) -> FeedbackAnswer:
        """As `HardlookClient.feedback`."""
        return await self._ask(feedback_call(kind, request_id, sha256, comment))

    async def _carry(self, call: Call[AnswerT], patient: bool) -> AnswerT:
        return await self._ask(call, rules=self._patient if patient else None)

    async def _ask(
        self, call: Call[AnswerT], request_id: str | None = None, *, rules: RetryRules | None = None
    ) -> AnswerT:
        steps = exchange(call, rules or self._rules, request_id)
        outcome: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                answer: AnswerT = stop.value
                return answer
            if isinstance(step, Send):
                outcome = await self._send(call, step)
            else:
                await asyncio.sleep(step.seconds)
                outcome = None

    async def _send(self, call: Call[AnswerT], step: Send) -> Reply | Failure:
        until_s = time.monotonic() + step.timeout_s
        try:
            async with asyncio.timeout(step.timeout_s) as timer:
                async with self._http.stream(**request_arguments(call, step)) as response:
                    with receiving(call, response, self._max_answer_bytes, until_s) as body:
                        if call.to is not None and response.status_code == call.status:
                            timer.reschedule(None)  # a file takes its time; that it keeps coming, httpx sees to
                        async for chunk in response.aiter_raw():
                            if not (body.add(chunk) if call.to is None else await asyncio.to_thread(body.add, chunk)):
                                break
                        return (
                            body.reply(response) if call.to is None else await asyncio.to_thread(body.reply, response)
                        )
        except httpx.TransportError as error:
            return failure(error)
        except TimeoutError:
            return Failure("not there in time", retried=False)


def _means_not_ready(error: HardlookError) -> bool:
    """Nothing answers, the service says so, or a proxy in front has nobody behind it."""
    if isinstance(error, AnswerNotUnderstood):
        return error.status in _GATEWAY_STATUSES
    return isinstance(error, ConnectionFailed | Unavailable)
