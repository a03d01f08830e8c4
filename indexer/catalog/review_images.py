"""What the review queue says of one image, whichever of its items says it last."""

from dataclasses import dataclass

from sqlalchemy import Connection, select

from indexer.catalog.tables import reviews


@dataclass(frozen=True)
class Standing:
    """Where an image is in the review queue.

    Attributes:
        undecided: whether somebody still has to look at it.
        collection: that it was compared with.
        exemplar_id: that came of it; None where it is undecided or was dismissed.
    """

    undecided: bool
    collection: str
    exemplar_id: str | None


def standing_of(connection: Connection, image_sha256: str) -> Standing | None:
    """The newest item about an image file; None where there is none."""
    query = select(reviews.c.state, reviews.c.collection, reviews.c.exemplar_id)
    query = query.where(reviews.c.image_sha256 == image_sha256).order_by(reviews.c.id.desc()).limit(1)
    row = connection.execute(query).first()
    return None if row is None else Standing(row.state != "decided", row.collection, row.exemplar_id)
