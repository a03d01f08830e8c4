"""What stands in for the classifier in tests of jobs: the file's bytes say what comes of it."""

from perception.errors import CorruptImage
from perception.verdict import VerdictLabel
from service.classifier import RemoteImage
from service.jobs import JobImage
from service.wire import DecidingFrame, Image, SnapshotVersion
from service.wire_jobs import JobItem


def judged(image: JobImage) -> JobItem:
    """The verdict that an image's bytes name; 'review' for a URL.

    Raises:
        CorruptImage: they name none.
    """
    word = "review" if isinstance(image.source, RemoteImage) else image.source.decode()
    if word not in set(VerdictLabel):
        raise CorruptImage(f"{word} is no image")
    return JobItem(
        id=image.id,
        verdict=VerdictLabel(word),
        pool=None,
        margin=None,
        reason=f"k is {image.job.parameters.get('k')}",
        frame=DecidingFrame(index=0, background=None, frames_examined=1),
        image=Image(format="PNG", width_px=1, height_px=1, frames_in_file=1),
        neighbors=[],
        flip_rate_at_eps=None,
        position=image.position,
        request_id=image.request_id,
        model="ab" * 32,
        snapshot=SnapshotVersion(collection="pools", version="0" * 16, created_at="2026-11-21T09:30:00+00:00"),
        policy="nearest-0",
    )
