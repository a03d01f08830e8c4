"""GET /pools: what is published, and by which model and rule it is used."""

from fastapi import APIRouter, Request

from service.runtime import caller_of, request_id_of, runtime_of
from service.schemas import described_collection, problem_responses
from service.wire import PoolsAnswer

router = APIRouter()


@router.get("/pools", summary="What is published?", responses=problem_responses(401, 429, 500, 503))
async def pools(request: Request) -> PoolsAnswer:
    """The moderation pools and all galleries, with their versions and the exemplars in them. Any scope will do."""
    await caller_of(request, None)
    runtime = runtime_of(request)
    snapshots = runtime.published.snapshots
    return PoolsAnswer(
        request_id=request_id_of(request),
        model=runtime.model,
        policy=runtime.policy,
        collections=[described_collection(snapshots[name]) for name in sorted(snapshots)],
    )
