"""What goes over the wire about jobs: lists of images that are classified in their own time.

As light as `service.wire`, and for the same readers.
"""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from perception.verdict import VerdictLabel
from service.wire import MAX_K, SHOWN_NEIGHBORS, Answer, ClassifyItem, ImageData, ItemError, Request, SnapshotVersion

PAGE_JOBS, MAX_PAGE_JOBS = 50, 200
PAGE_RESULTS, MAX_PAGE_RESULTS = 100, 1000
_REQUEST_ID = "b0c7a1e2d3f44556a7b8c9d0e1f20314"
_JOB_ID = "5d0c1b7e9f2a48c6b3d1e0f9a8b7c6d5"
_TIME = "2026-11-21T09:30:00.000000+00:00"


class JobBody(Request):
    """JSON body of a new job."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [{"images": [{"id": "banner", "url": "https://example.org/banner.webp"}], "callback": True}]
        },
    )
    images: list[ImageData] = Field(min_length=1, description="At most HARDLOOK_MAX_JOB_IMAGES.")
    k: int | None = Field(
        None, ge=1, le=MAX_K, description=f"Neighbours of each pool to show, {SHOWN_NEIGHBORS} by default."
    )
    callback: bool = Field(False, description="Send the event `job.done` to the webhooks that ask for it.")

    @model_validator(mode="after")
    def _storable(self) -> Self:
        if any("\0" in (image.id or "") or "\0" in (image.url or "") for image in self.images):
            raise ValueError("an id or a url has the character NUL")
        return self


class JobsQuery(Request):
    """Query of the list of jobs."""

    after: str | None = Field(
        None, pattern=r"^[0-9a-f]{32}$", description="The `next` of the page before.", examples=[_JOB_ID]
    )
    limit: int = Field(PAGE_JOBS, ge=1, le=MAX_PAGE_JOBS, description="The most jobs.")


class JobResultsQuery(Request):
    """Query of the results of a job."""

    after: int = Field(-1, ge=-1, le=2**31 - 1, description="The `next` of the page before; -1 for the first.")
    limit: int = Field(PAGE_RESULTS, ge=1, le=MAX_PAGE_RESULTS, description="The most results.")


class Job(Answer):
    """A job as it stands."""

    id: str = Field(examples=[_JOB_ID])
    state: Literal["queued", "running", "done", "cancelled"]
    total: int = Field(description="Images of the job.", examples=[200])
    done: int = Field(description="Images that have a verdict.", examples=[120])
    failed: int = Field(description="Images that have an error of their own.", examples=[2])
    waiting: int = Field(description="Images without an answer; final in a cancelled job.", examples=[78])
    verdicts: dict[VerdictLabel, int] = Field(
        description="Images by verdict; those without any are left out.", examples=[{"safe": 118, "unsafe": 2}]
    )
    created_at: str = Field(examples=[_TIME])
    finished_at: str | None = Field(description="When it was done or cancelled.", examples=[None])
    expires_at: str | None = Field(description="When the job and its results are erased.", examples=[None])


class JobAnswer(Answer):
    """Answer about one job."""

    request_id: str = Field(examples=[_REQUEST_ID])
    job: Job


class JobsAnswer(Answer):
    """Answer of the list of jobs, newest first."""

    request_id: str = Field(examples=[_REQUEST_ID])
    jobs: list[Job]
    next: str | None = Field(description="The `after` of the next page; null where there is none.", examples=[None])


class JobItem(ClassifyItem):
    """The verdict on one image of a job, and by what it was made."""

    position: int = Field(description="Of the image in the job, from 0.", examples=[0])
    request_id: str = Field(description="Of this image, in the decision log.", examples=[f"{_JOB_ID}-0"])
    model: str = Field(description="Fingerprint of the encoder.")
    snapshot: SnapshotVersion
    policy: str = Field(description="Version of the policy.", examples=["nearest-3f5a9c0e1b2d"])


class JobItemError(ItemError):
    """One image of a job that could not be answered."""

    position: int = Field(description="Of the image in the job, from 0.", examples=[1])
    request_id: str = Field(examples=[f"{_JOB_ID}-1"])


class JobResultsAnswer(Answer):
    """Answer of the results of a job: a verdict or an error an image, in the order of the job."""

    request_id: str = Field(examples=[_REQUEST_ID])
    job_id: str = Field(examples=[_JOB_ID])
    results: list[Annotated[JobItem | JobItemError, Field(discriminator="status")]]
    next: int | None = Field(
        description="The `after` with which to ask for more, now or later; null once there is no more.", examples=[99]
    )
