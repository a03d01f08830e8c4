"""From a ready-made Gallery file to the contents of a snapshot, without pixels.

So embeddings that were made elsewhere, such as the demonstration pools, are published like those of a build.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from indexer.contents import Contents, Exemplar
from indexer.errors import ContentsError, DuplicateId, SourceError
from perception.gallery import Gallery

_EXEMPLAR_ADAPTER = TypeAdapter(Exemplar)


def read_details(path: Path) -> dict[str, Exemplar]:
    """Read what is known of exemplars, by id: JSON lines like those of a snapshot's exemplars.jsonl.

    Raises:
        SourceError: the file cannot be read, or a line is wrong; names it.
        DuplicateId: an id occurs twice.
    """
    details: dict[str, Exemplar] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(path, f"cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            exemplar = _EXEMPLAR_ADAPTER.validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise SourceError(path, f"line {number}: {first['msg']} at {first['loc']}") from error
        except ContentsError as error:
            raise SourceError(path, f"line {number}: {error}") from error
        if exemplar.id in details:
            raise DuplicateId(exemplar.id)
        details[exemplar.id] = exemplar
    return details


def stage_gallery(
    gallery: Gallery, *, collection: str, encoder_name: str, details: Mapping[str, Exemplar] | None = None
) -> Contents:
    """Make a gallery the contents of a collection.

    Args:
        gallery: ids, labels, embeddings and encoder fingerprint.
        collection: what the snapshot will be of; for the moderation collection labels are the three pools.
        encoder_name: of the encoder that made the embeddings, for a person.
        details: sha256, source and metadata by id; may lack ids, but not name others, nor other labels.

    Raises:
        ContentsError, InvalidLabel, InvalidName: they do not fit together.
    """
    details = details or {}
    unknown = sorted(set(details) - set(gallery.ids))
    if unknown:
        raise ContentsError(f"details of {len(unknown)} ids that the gallery does not have, such as {unknown[0]!r}")
    exemplars = []
    for id, label in zip(gallery.ids, gallery.labels, strict=True):
        exemplar = details.get(id, Exemplar(id, label))
        if exemplar.label != label:
            raise ContentsError(f"{id!r} has the label {label!r} in the gallery, {exemplar.label!r} in the details")
        exemplars.append(exemplar)
    return Contents.arrange(collection, encoder_name, gallery.encoder_fingerprint, exemplars, gallery.embeddings)
