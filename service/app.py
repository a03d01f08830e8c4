"""The composition root: settings in, a FastAPI application out. Everything is put together here and nowhere else."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from indexer.contents import POOLS, Contents
from indexer.errors import IndexerError
from indexer.snapshot import Snapshot
from perception.errors import CheckpointError, PerceptionError
from perception.policy_file import CalibratedPolicy
from service.admission import Admission
from service.api import classify, health, pools, similar
from service.api.documentation import document
from service.batching import Batcher
from service.classifier import Classifier
from service.decoding import DecoderPool, DecoderSettings
from service.engine import Engine, Query, Search, ServingEncoder, Sighting, TextTower
from service.errors import ServiceError
from service.intake import invalid_parameter
from service.memory import trim_when_idle
from service.problems import MEDIA_TYPE, extra_headers, http_problem, problem
from service.published import Published
from service.request_log import RequestLog
from service.runtime import Runtime, request_id_of
from service.schemas import Model, Policy
from service.settings import Settings

_log = logging.getLogger("hardlook.app")
_DESCRIPTION = """Nearest neighbours of adversarially robust image embeddings decide, and are shown with the decision.

Every error is an RFC 9457 problem (`application/problem+json`). Every answer names its request id, which is also in the
header `X-Request-ID`, taken from the request where it has one."""


@dataclass(frozen=True)
class Loaded:
    """What takes long to load, or may refuse to: the encoder, its text tower, the snapshots, the calibrated policy."""

    encoder: ServingEncoder
    text: TextTower | None
    published: Published
    calibrated: CalibratedPolicy | None = None


def load(settings: Settings, encoder: ServingEncoder | None = None) -> Loaded:
    """Load what the settings name, and try it out.

    Args:
        settings: of the service.
        encoder: used instead of the one that the settings name.

    Raises:
        UnknownEncoder, HubUnreachable, CheckpointError: the encoder cannot be loaded.
        NonFiniteEmbedding: it does not work.
        FingerprintMismatch: a published snapshot or the policy file was made by another encoder; names both.
        IndexerError: a published snapshot is damaged.
        PolicyError: the policy file is absent or damaged.
    """
    calibrated = None if settings.policy_file is None else CalibratedPolicy.load(settings.policy_file)
    if encoder is None:
        encoder = _load_encoder(settings)
    if calibrated is not None:
        calibrated.require_encoder(encoder.fingerprint, f"calibrated policy {settings.policy_file}")
    text: TextTower | None = None
    try:
        text = getattr(encoder, "text", None)
    except CheckpointError as error:
        _log.warning("no search by text: %s", error)
    published = Published(settings.pools, encoder.fingerprint)
    if calibrated is not None:
        _compare_pools(calibrated, published)
    _warm_up(encoder, text)
    return Loaded(encoder, text, published, calibrated)


def _load_encoder(settings: Settings) -> ServingEncoder:
    import torch

    from perception.catalogue import load_encoder

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_encoder(settings.encoder, precision=settings.precision, device=device)


def _compare_pools(calibrated: CalibratedPolicy, published: Published) -> None:
    """Say so where other pools are served than the policy was audited with: its rates are those of the audited ones."""
    pools = published.snapshots.get(POOLS)
    if pools is not None and pools.to_gallery().sha256 != calibrated.gallery_sha256:
        _log.warning(
            "policy %r was audited with other pools (gallery %s) than version %s, which is served: audit again",
            calibrated.name,
            calibrated.gallery_sha256,
            pools.version,
        )


def _warm_up(encoder: ServingEncoder, text: TextTower | None) -> None:
    """Answer one query of each kind, so that the first caller does not pay for what is built on first use."""
    size_px = encoder.preprocess.size_px
    empty = Contents("warmup", encoder.name, encoder.fingerprint, (), np.zeros((0, encoder.dim), np.float32))
    search = Search(Snapshot.of(empty), k=1)
    # Noise: a plain image may have no embedding in a tiny encoder.
    pixels = np.random.default_rng(0).integers(0, 256, (3, size_px, size_px), dtype=np.uint8)
    engine = Engine(encoder, text)
    engine.answer([Query(pixels, search)])
    if text is not None:
        engine.answer([Query("a photo", search)])


def create_app(settings: Settings, loaded: Loaded | None = None) -> FastAPI:
    """Put the service together.

    Args:
        settings: of the service.
        loaded: what `load` returned; loaded at start-up where None.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts: Loaded = await asyncio.to_thread(load, settings) if loaded is None else loaded
        async with AsyncExitStack() as stack:
            runtime = app.state.runtime = await _start(settings, parts, stack)
            chores = [
                asyncio.create_task(parts.published.watch(settings.pools_reload_s)),
                asyncio.create_task(trim_when_idle(runtime.admission.idle_since_work)),
            ]
            try:
                yield
            finally:
                runtime.draining = True
                for chore in chores:
                    chore.cancel()
                await asyncio.gather(*chores, return_exceptions=True)

    app = FastAPI(
        title="hardlook",
        version=_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        # The interactive pages would load scripts from a foreign host.
        docs_url=None,
        redoc_url=None,
    )
    for routes in (classify, similar, pools, health):
        app.include_router(routes.router)
    app.add_middleware(RequestLog)
    for error_type in (PerceptionError, IndexerError, ServiceError):
        app.add_exception_handler(error_type, _answer_expected)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    document(app)
    return app


async def _start(settings: Settings, parts: Loaded, stack: AsyncExitStack) -> Runtime:
    """Start the decoding processes and the worker thread; the stack ends them, the thread first."""
    decoder = await stack.enter_async_context(
        DecoderPool(
            DecoderSettings(
                settings.image_limits,
                parts.encoder.preprocess,
                settings.decode_timeout_s,
                settings.decode_memory_bytes,
            ),
            workers=settings.decode_workers,
        )
    )
    engine = Engine(parts.encoder, parts.text)
    batcher: Batcher[Query, Sighting] = await stack.enter_async_context(
        Batcher(engine.answer, max_batch=settings.max_batch, max_queue=settings.max_queue, name="encoder queue")
    )
    encoder = parts.encoder
    policy = settings.policy if parts.calibrated is None else parts.calibrated.policy
    return Runtime(
        settings=settings,
        model=Model(name=encoder.name, fingerprint=encoder.fingerprint, precision=encoder.precision),
        policy=Policy.of(policy, parts.calibrated),
        calibrated=parts.calibrated,
        published=parts.published,
        classifier=Classifier(parts.published, decoder, batcher, policy, settings.deadline_s),
        admission=Admission(settings.max_requests),
    )


async def _answer_expected(request: Request, error: Exception) -> JSONResponse:
    body = problem(error, request_id_of(request))
    if body["status"] == 500:
        _log.error("a bug", exc_info=error, extra={"fields": {"request_id": body["request_id"]}})
    return _response(body)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = http_problem(error.status_code, str(error.detail), request_id_of(request))
    return _response(body, dict(error.headers or {}))


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _response(problem(invalid_parameter(error.errors()), request_id_of(request)))


def _response(body: dict[str, object], headers: dict[str, str] | None = None) -> JSONResponse:
    status = int(str(body["status"]))
    return JSONResponse(
        body, status_code=status, media_type=MEDIA_TYPE, headers={**extra_headers(status), **(headers or {})}
    )


def _version() -> str:
    try:
        return version("hardlook")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
