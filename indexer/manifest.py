"""The form of a snapshot on disk: a folder `<version>/` with manifest.json, vectors.safetensors and exemplars.jsonl.

The manifest holds the size and sha256 of the other two files and of itself, so that every changed byte is found. The
version is a hash of what decides an answer: equal contents have equal versions, whenever they were built.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.numpy
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from indexer.contents import Contents, Exemplar, Kind
from indexer.errors import IndexerError, SnapshotError

_FORMAT = "hardlook-snapshot-1"
MANIFEST, VECTORS, EXEMPLARS = "manifest.json", "vectors.safetensors", "exemplars.jsonl"
_VERSION_DIGITS = 16


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file of a snapshot."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a snapshot says of itself.

    Attributes:
        format: version of this layout.
        version: 16 hex digits, hash of everything but `created_at`.
        collection, kind: name, and 'pools' or 'gallery'.
        created_at: ISO 8601, UTC.
        encoder_name, encoder_fingerprint: of the encoder that made the vectors.
        dim: d.
        counts: exemplars by label.
        files: the other files by name.
        sha256: hash of all fields above.
    """

    format: str
    version: str
    collection: str
    kind: Kind
    created_at: str
    encoder_name: str
    encoder_fingerprint: str
    dim: int
    counts: Mapping[str, int]
    files: Mapping[str, FileRecord]
    sha256: str

    @property
    def artefact(self) -> str:
        """How errors name the snapshot."""
        return f"snapshot {self.collection}/{self.version}"

    def to_bytes(self) -> bytes:
        """The manifest file."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()


_MANIFEST_ADAPTER = TypeAdapter(Manifest)
_EXEMPLAR_ADAPTER = TypeAdapter(Exemplar)


def exemplar_line(exemplar: Exemplar) -> str:
    """One line of exemplars.jsonl."""
    fields = {
        "id": exemplar.id,
        "label": exemplar.label,
        "sha256": exemplar.sha256,
        "source": exemplar.source,
        "metadata": dict(exemplar.metadata),
    }
    return json.dumps(fields, sort_keys=True) + "\n"


def describe(contents: Contents, created_at: str | None = None) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of contents, and the other files by name; `created_at` is now where None."""
    files = {
        VECTORS: safetensors.numpy.save({"embeddings": contents.embeddings}),
        EXEMPLARS: "".join(exemplar_line(exemplar) for exemplar in contents.exemplars).encode(),
    }
    fields: dict[str, Any] = {
        "format": _FORMAT,
        "collection": contents.collection,
        "kind": contents.kind,
        "encoder_name": contents.encoder_name,
        "encoder_fingerprint": contents.encoder_fingerprint,
        "dim": contents.dim,
        "counts": contents.counts,
        "files": {name: {"size_bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()},
    }
    fields["version"] = _digest(fields)[:_VERSION_DIGITS]
    fields["created_at"] = created_at or datetime.now(UTC).isoformat(timespec="seconds")
    fields["sha256"] = _digest(fields)
    return _MANIFEST_ADAPTER.validate_python(fields), files


def read_manifest(folder: Path) -> Manifest:
    """Read and check a snapshot's manifest; its other files are not opened.

    Raises:
        SnapshotError: absent, damaged, of another format, or in a folder that is not called like its version.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        manifest = _MANIFEST_ADAPTER.validate_json(data, strict=True)
    except OSError as error:
        raise SnapshotError(path, f"cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise SnapshotError(path, f"is damaged: {_first_reason(error)}") from error
    if manifest.format != _FORMAT:
        raise SnapshotError(path, f"format {manifest.format!r}, expected {_FORMAT!r}")
    fields = asdict(manifest)
    recorded = fields.pop("sha256")
    if _digest(fields) != recorded or manifest.to_bytes() != data:
        raise SnapshotError(path, "is damaged: it differs from the hash that it records of itself")
    for field in ("created_at", "version"):
        del fields[field]
    if _digest(fields)[:_VERSION_DIGITS] != manifest.version or folder.name != manifest.version:
        raise SnapshotError(folder, f"version {manifest.version!r} does not fit the contents or the folder's name")
    if set(manifest.files) != {VECTORS, EXEMPLARS}:
        raise SnapshotError(path, f"lists the files {sorted(manifest.files)}, expected {[EXEMPLARS, VECTORS]}")
    return manifest


def read_contents(folder: Path, manifest: Manifest) -> Contents:
    """Read and check everything that the manifest describes.

    Raises:
        SnapshotError: a file is absent or changed, or exemplars and vectors do not fit together.
    """
    for name, record in manifest.files.items():
        _check_file(folder / name, record)
    try:
        with safe_open(folder / VECTORS, framework="numpy") as file:
            embeddings = file.get_tensor("embeddings")
        lines = (folder / EXEMPLARS).read_bytes().split(b"\n")[:-1]
        exemplars = tuple(_EXEMPLAR_ADAPTER.validate_json(line, strict=True) for line in lines)
        contents = Contents(
            manifest.collection, manifest.encoder_name, manifest.encoder_fingerprint, exemplars, embeddings
        )
    except ValidationError as error:
        raise SnapshotError(folder / EXEMPLARS, f"is damaged: {_first_reason(error)}") from error
    except (OSError, SafetensorError, IndexerError) as error:
        raise SnapshotError(folder, str(error)) from error
    found = (contents.kind, contents.dim, contents.counts)
    if found != (manifest.kind, manifest.dim, manifest.counts):
        raise SnapshotError(folder, f"kind, dim and counts are {found}, the manifest differs")
    return contents


def _check_file(path: Path, record: FileRecord) -> None:
    try:
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            raise SnapshotError(path, f"has {size_bytes} bytes, the manifest says {record.size_bytes}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SnapshotError(path, f"cannot be read: {error.strerror}") from error
    if found != record.sha256:
        raise SnapshotError(path, f"is damaged: sha256 {found}, the manifest says {record.sha256}")


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _first_reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}".removeprefix(": ")
