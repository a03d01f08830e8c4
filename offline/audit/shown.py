"""The examples of a report: pictures as data URIs where the run directory has them, and what may not be shown at once.

A picture of anything unsafe, or that may be, is blurred until the reader asks for it.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offline.audit.examples import SHOWN, neighbor_picture
from offline.audit.record import EXAMPLES_FOLDER, AuditRecord, Judgement
from perception.verdict import Neighbor, PoolLabel, VerdictLabel

_STEM = re.compile(r"[\w-]+")
_PNG = b"\x89PNG\r\n\x1a\n"
_PARTS = {"clean": "clean", "delta": "perturbation x 10", "attacked": "attacked"}
_MAY_BE_UNSAFE = frozenset((*VerdictLabel, *PoolLabel)) - {"safe"}


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        uri: data URI; empty where the run directory has no such picture.
        caption: below it.
        alt: in words.
        veiled: blurred until the reader asks for it.
    """

    uri: str
    caption: str
    alt: str
    veiled: bool


@dataclass(frozen=True)
class ShownExample:
    """One example.

    Attributes:
        record: whose it is.
        pictures: clean, perturbation, attacked.
        before, after: the nearest neighbours of the clean and of the attacked image.
    """

    record: AuditRecord
    pictures: tuple[Picture, ...]
    before: tuple[Picture, ...]
    after: tuple[Picture, ...]

    @property
    def veiled(self) -> bool:
        """There is something to unveil."""
        return any(p.veiled and p.uri for p in (*self.pictures, *self.before, *self.after))


def shown_examples(run: Path, systems: Sequence[str], records: Sequence[AuditRecord]) -> list[ShownExample]:
    """All examples, by system in this order, then by name."""
    chosen = [record for record in records if record.example]
    chosen.sort(key=lambda record: (systems.index(record.system), record.set, record.example))
    return [_shown(run / EXAMPLES_FOLDER, record) for record in chosen]


def _shown(folder: Path, record: AuditRecord) -> ShownExample:
    answers = (record.clean.answer, record.attacked.answer, record.rounded.answer)
    veiled = not _MAY_BE_UNSAFE.isdisjoint((record.label, *answers))
    named = _STEM.fullmatch(record.example) is not None  # a name is data, and could lead out of the folder
    pictures = tuple(
        Picture(
            uri=_data_uri(folder / f"{record.example}-{part}.png") if named else "",
            caption=caption,
            alt=f"{caption}: {record.id}",
            veiled=veiled,
        )
        for part, caption in _PARTS.items()
    )
    return ShownExample(record, pictures, _neighbors(folder, record.clean), _neighbors(folder, record.attacked))


def _neighbors(folder: Path, judgement: Judgement) -> tuple[Picture, ...]:
    return tuple(_neighbor(folder, neighbor) for neighbor in judgement.neighbors[:SHOWN])


def _neighbor(folder: Path, neighbor: Neighbor) -> Picture:
    return Picture(
        uri=_data_uri(folder / neighbor_picture(neighbor.id)),
        caption=f"{neighbor.id} ({neighbor.pool}, {neighbor.similarity:.3f})",
        alt=f"neighbour {neighbor.id} in {neighbor.pool}",
        veiled=neighbor.pool in _MAY_BE_UNSAFE,
    )


def _data_uri(path: Path) -> str:
    """A PNG file within a URI; empty for what cannot be read or is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""  # a picture that is missing costs the report a picture, not the reader the figures
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(_PNG) else ""
