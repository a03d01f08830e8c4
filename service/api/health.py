"""GET /healthz and /readyz: alive is not ready."""

from fastapi import APIRouter, Request

from service.errors import NotReady
from service.runtime import runtime_of
from service.schemas import Alive, Ready, SnapshotVersion, problem_responses

router = APIRouter()


@router.get("/healthz", summary="Is the process alive?", responses=problem_responses(500))
async def healthz() -> Alive:
    """Alive: restart the process when this fails, and only then."""
    return Alive()


@router.get("/readyz", summary="Can it classify?", responses=problem_responses(500, 503))
async def readyz(request: Request) -> Ready:
    """Ready: the encoder and the pools are loaded, and the service is not shutting down."""
    runtime = runtime_of(request)
    if runtime.draining:
        raise NotReady("the service is shutting down")
    return Ready(model=runtime.model, snapshot=SnapshotVersion.of(runtime.published.pools()))
