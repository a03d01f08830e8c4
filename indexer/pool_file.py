"""Pool file: a collection, or one label of it, as one file without pixels, to hand to somebody else.

The container is that of safetensors, so other programs can read it too:

    8 bytes     length of the header, little-endian
    header      JSON; its metadata hold a JSON object, `hardlook-pool`, see `Header`
    embeddings  tensor (n, d) float32, in the order of the exemplars
    exemplars   tensor (bytes) uint8: n lines of JSON, ordered by label, then id

The header holds a sha256 over itself and all the rest, which is checked before anything else of the file is believed.
It shows damage, not forgery: whoever can change the file can calculate it anew. Equal collections make equal files.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from indexer.contents import POOL_LABELS, Contents, Exemplar, Kind
from indexer.durable import sync_folder
from indexer.errors import IndexerError, InvalidLabel, PoolFileError
from indexer.live.view import View
from indexer.snapshot import Snapshot
from perception.errors import FingerprintMismatch

MAX_POOL_FILE_BYTES = 32 * 2**30
MAX_HEADER_BYTES = 16 * 2**20  # it counts exemplars by label, of which a gallery may have many
MAX_EXEMPLARS = 10_000_000
MAX_DIM = 65_536
_FORMAT = "hardlook-pool-1"
_METADATA = "hardlook-pool"
_ALIGNMENT = 8  # of the header, as safetensors wants it
_CHUNK_ROWS = 8192
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Header:
    """What a pool file says of itself.

    Attributes:
        format: version of this layout.
        collection, kind: name, and 'pools' or 'gallery'.
        label: the only one that was exported; None for all.
        encoder_name, encoder_fingerprint: of the encoder that made the embeddings.
        dim: d.
        version, revision, created_at: of the collection that it was exported from.
        n, counts: exemplars, and by label.
        exemplars_bytes: length of the lines.
        sha256: over all of the above, the embeddings and the lines.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: str
    collection: str
    kind: Kind
    label: str | None
    encoder_name: str
    encoder_fingerprint: str
    dim: Annotated[int, Field(ge=1, le=MAX_DIM)]
    version: str
    revision: Annotated[int, Field(ge=0)]
    created_at: str
    n: Annotated[int, Field(ge=0, le=MAX_EXEMPLARS)]
    counts: Mapping[str, int]
    exemplars_bytes: Annotated[int, Field(ge=0)]
    sha256: str

    @property
    def embeddings_bytes(self) -> int:
        """Length of the embeddings."""
        return 4 * self.n * self.dim

    def to_bytes(self) -> bytes:
        """The file up to the embeddings."""
        end = self.embeddings_bytes + self.exemplars_bytes
        container = {
            "__metadata__": {_METADATA: _json(asdict(self))},
            "embeddings": {"dtype": "F32", "shape": [self.n, self.dim], "data_offsets": [0, self.embeddings_bytes]},
            "exemplars": {
                "dtype": "U8",
                "shape": [self.exemplars_bytes],
                "data_offsets": [self.embeddings_bytes, end],
            },
        }
        text = _json(container).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def digest(self) -> "hashlib._Hash":
        """The hash of everything but the embeddings and the lines, which are to follow in this order."""
        fields = asdict(self)
        del fields["sha256"]
        return hashlib.sha256(_json(fields).encode() + b"\n")


@dataclass(frozen=True)
class _Line:
    """An exemplar and its note, as in the file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    label: str
    sha256: str
    source: str
    metadata: dict[str, str]
    note: str


_HEADER_ADAPTER = TypeAdapter(Header)
_LINE_ADAPTER = TypeAdapter(_Line)


@dataclass(frozen=True, eq=False)
class PoolFile:
    """What a pool file holds.

    Attributes:
        header: what it says of itself.
        contents: exemplars and embeddings.
        notes: of operators, by id; only of exemplars that have one.
    """

    header: Header
    contents: Contents
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return len(self.header.to_bytes()) + self.header.embeddings_bytes + self.header.exemplars_bytes

    def chunks(self) -> Iterator[bytes]:
        """The file, piece by piece."""
        yield self.header.to_bytes()
        yield from _embedding_chunks(self.contents.embeddings)
        yield from _line_chunks(self.contents, self.notes)


def export(view: View | Snapshot, label: str | None = None) -> PoolFile:
    """What searches can find in a collection, or in one label of it, with the notes.

    Disabled exemplars and suppress items stay behind.

    Raises:
        InvalidLabel: the moderation collection is asked for another label than the three pools.
    """
    if view.kind == "pools" and label is not None and label not in POOL_LABELS:
        raise InvalidLabel(label, POOL_LABELS, view.collection)
    contents = view.contents()
    if label is not None:
        rows = [row for row, exemplar in enumerate(contents.exemplars) if exemplar.label == label]
        part = contents.embeddings[rows[0] : rows[-1] + 1] if rows else contents.embeddings[:0]  # they are contiguous
        exemplars = tuple(contents.exemplars[row] for row in rows)
        contents = Contents(contents.collection, contents.encoder_name, contents.encoder_fingerprint, exemplars, part)
    notes: dict[str, str] = {}
    if isinstance(view, View):
        records = view.state.records
        noted = ((e.id, records.get(e.id)) for e in contents.exemplars) if records else ()
        notes = {id: record.note for id, record in noted if record is not None and record.note}
    fields: dict[str, Any] = {
        "format": _FORMAT,
        "collection": contents.collection,
        "kind": contents.kind,
        "label": label,
        "encoder_name": contents.encoder_name,
        "encoder_fingerprint": contents.encoder_fingerprint,
        "dim": contents.dim,
        "version": view.version,
        "revision": view.revision if isinstance(view, View) else 0,
        "created_at": view.created_at,
        "n": len(contents.exemplars),
        "counts": contents.counts,
        "exemplars_bytes": sum(map(len, _line_chunks(contents, notes))),
    }
    digest = Header(**fields, sha256="").digest()
    for chunk in (*_embedding_chunks(contents.embeddings), *_line_chunks(contents, notes)):
        digest.update(chunk)
    return PoolFile(Header(**fields, sha256=digest.hexdigest()), contents, notes)


def write_pool_file(path: Path, pool_file: PoolFile) -> None:
    """Write a pool file; the name appears, or is replaced, only when all is on disk.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.writelines(pool_file.chunks())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_pool_file(
    path: Path, encoder_fingerprint: str | None = None, *, max_bytes: int = MAX_POOL_FILE_BYTES
) -> PoolFile:
    """Read and check a pool file.

    Args:
        path: of the file.
        encoder_fingerprint: of the encoder in use; None to read a file of any.
        max_bytes: the most that it may have.

    Raises:
        PoolFileError: it cannot be read, is too large, damaged or no pool file; says what is wrong.
        FingerprintMismatch: another encoder made it; names both.
    """
    try:
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, path, encoder_fingerprint, max_bytes)
    except OSError as error:
        raise PoolFileError(path, f"cannot be read: {error.strerror}") from error


def parse_pool_file(data: bytes, name: str, encoder_fingerprint: str | None = None) -> PoolFile:
    """The same from memory; `name` stands for the path in errors."""
    return _read(io.BytesIO(data), len(data), Path(name), encoder_fingerprint, MAX_POOL_FILE_BYTES)


def _read(file: io.BufferedIOBase, size: int, path: Path, encoder_fingerprint: str | None, max_bytes: int) -> PoolFile:
    if size > max_bytes:
        raise PoolFileError(path, f"has {size} bytes, the limit is {max_bytes}")
    header = _read_header(file, size, path)
    digest = header.digest()
    vectors, lines = (_take(file, n, digest, path) for n in (header.embeddings_bytes, header.exemplars_bytes))
    if digest.hexdigest() != header.sha256:
        raise PoolFileError(path, f"is damaged: sha256 {digest.hexdigest()}, it says {header.sha256}")
    if encoder_fingerprint is not None and encoder_fingerprint != header.encoder_fingerprint:
        raise FingerprintMismatch(f"pool file {path}", encoder_fingerprint, header.encoder_fingerprint)
    embeddings = np.frombuffer(vectors, "<f4").reshape(header.n, header.dim).astype(np.float32, copy=False)
    return _checked(header, embeddings, lines, path)


def _take(file: io.BufferedIOBase, n: int, digest: "hashlib._Hash", path: Path) -> bytearray:
    """The next n bytes, which the hash has seen then."""
    data = bytearray(n)
    for start in range(0, n, _CHUNK_BYTES):
        part = memoryview(data)[start : start + _CHUNK_BYTES]
        if file.readinto(part) != len(part):
            raise PoolFileError(path, "became shorter while it was read")
        digest.update(part)
    return data


def _read_header(file: io.BufferedIOBase, size: int, path: Path) -> Header:
    """The header, as far as it can be checked without the rest."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= size - 8:
        raise PoolFileError(path, f"is no pool file, or cut off: it has {size} bytes, its header {length}")
    if length > MAX_HEADER_BYTES:
        raise PoolFileError(path, f"its header has {length} bytes, the limit is {MAX_HEADER_BYTES}")
    text = file.read(length)
    try:
        found = json.loads(text)["__metadata__"][_METADATA]
        header = _HEADER_ADAPTER.validate_json(found, strict=True)
    except ValidationError as error:
        raise PoolFileError(path, f"its header is damaged: {_first_reason(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PoolFileError(path, "is no pool file: its header cannot be read") from error
    if header.format != _FORMAT:
        raise PoolFileError(path, f"format {header.format!r}, expected {_FORMAT!r}")
    written = header.to_bytes()
    if written != length.to_bytes(8, "little") + text:
        raise PoolFileError(path, "its header is damaged: it differs from what it describes")
    expected = len(written) + header.embeddings_bytes + header.exemplars_bytes
    if size != expected:
        raise PoolFileError(path, f"has {size} bytes, its header says {expected}: it is cut off or damaged")
    return header


def _checked(header: Header, embeddings: NDArray[np.float32], data: bytearray, path: Path) -> PoolFile:
    """Whether the parts of a file, which are as they were written, fit together."""
    try:
        lines = [_LINE_ADAPTER.validate_json(line, strict=True) for line in data.split(b"\n")[:-1]]
        exemplars = tuple(Exemplar(e.id, e.label, e.sha256, e.source, e.metadata) for e in lines)
        contents = Contents(header.collection, header.encoder_name, header.encoder_fingerprint, exemplars, embeddings)
    except ValidationError as error:
        raise PoolFileError(path, f"an exemplar is damaged: {_first_reason(error)}") from error
    except IndexerError as error:
        raise PoolFileError(path, str(error)) from error
    if (contents.kind, contents.counts) != (header.kind, dict(header.counts)):
        raise PoolFileError(path, f"kind and counts are {contents.kind} {contents.counts}, its header differs")
    if header.label is not None and {e.label for e in exemplars} - {header.label}:
        raise PoolFileError(path, f"it has other labels than {header.label!r}")
    return PoolFile(header, contents, {line.id: line.note for line in lines if line.note})


def _embedding_chunks(embeddings: NDArray[np.float32]) -> Iterator[bytes]:
    for start in range(0, len(embeddings), _CHUNK_ROWS):
        yield embeddings[start : start + _CHUNK_ROWS].astype("<f4").tobytes()


def _line_chunks(contents: Contents, notes: Mapping[str, str]) -> Iterator[bytes]:
    """The lines of the exemplars, many at a time."""
    lines: list[bytes] = []
    size = 0
    for exemplar in contents.exemplars:
        fields = {
            "id": exemplar.id,
            "label": exemplar.label,
            "sha256": exemplar.sha256,
            "source": exemplar.source,
            "metadata": dict(exemplar.metadata),
            "note": notes.get(exemplar.id, ""),
        }
        lines.append(f"{_json(fields)}\n".encode())
        size += len(lines[-1])
        if size >= _CHUNK_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _first_reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}".removeprefix(": ")
