"""GET /metrics: what Prometheus asks for."""

from fastapi import APIRouter, Request, Response

from service.runtime import caller_of
from service.schemas import problem_responses

router = APIRouter()


@router.get(
    "/metrics",
    summary="Counters and histograms for Prometheus",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."},
        **problem_responses(401, 403, 500, 503),
    },
)
async def metrics(request: Request) -> Response:
    """Everything that is counted; docs/operations.md explains each. Needs the scope `metrics`."""
    await caller_of(request, "metrics", images=0)
    body, media_type = request.app.state.metrics.render(request.headers.get("accept"))
    return Response(body, media_type=media_type)
