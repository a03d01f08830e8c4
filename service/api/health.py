"""GET /livez, /readyz and /startupz: alive is not ready, and starting is neither broken."""

from fastapi import APIRouter, Request

from service.errors import NotReady
from service.runtime import runtime_of, state_of
from service.schemas import problem_responses, snapshot_version
from service.wire import Alive, Ready, Started

router = APIRouter()


@router.get("/livez", summary="Is the process alive?", responses=problem_responses(500, 503))
async def livez(request: Request) -> Alive:
    """Alive: restart the process when this fails, and only then. It fails when every replica of the encoder has."""
    if state_of(request.app) == "broken":
        raise NotReady("every replica of the encoder has failed: the process must be restarted")
    return Alive()


@router.get("/healthz", summary="The same as /livez", responses=problem_responses(500, 503))
async def healthz(request: Request) -> Alive:
    """The same as /livez, under its older name."""
    return await livez(request)


@router.get("/startupz", summary="Has it started?", responses=problem_responses(500, 503))
async def startupz(request: Request) -> Started:
    """Started: the encoder is loaded and the snapshots are read, whether or not pools are published among them."""
    runtime_of(request)
    return Started()


@router.get("/readyz", summary="Can it classify?", responses=problem_responses(500, 503))
async def readyz(request: Request) -> Ready:
    """Ready: the encoder and the pools are loaded, and the service is not shutting down."""
    state = state_of(request.app)
    if state == "draining":
        raise NotReady("the service is shutting down")
    runtime = runtime_of(request)
    if state == "broken":
        raise NotReady("every replica of the encoder has failed")
    return Ready(model=runtime.model, snapshot=snapshot_version(runtime.published.pools()))
