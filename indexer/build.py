"""From a source of image files to the contents of a snapshot: streaming, resumable, and not stopped by bad files.

Files are read and decoded in a few threads while the encoder works. The result is a function of source, encoder and
batch size alone: batches never cross parts, so a resumed build has the same batches as an uninterrupted one, and the
same bytes.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from indexer.contents import Contents, Exemplar, collection_kind
from indexer.errors import BuildError, DuplicateId
from indexer.sources import Skipped, Source, SourceItem
from indexer.workdir import Outcomes, Part, WorkDir
from perception.errors import NonFiniteEmbedding
from perception.image import ImageLimits, decode
from perception.preprocess import PreprocessSpec, to_pixels

if TYPE_CHECKING:
    from perception.encoder import Encoder

BATCHES_PER_PART = 8  # what a kill can cost
_WORKERS = 2  # decoding is several times faster than encoding
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildReport:
    """A finished build.

    Attributes:
        contents: ready to be published.
        n_entries: how many entries the source had.
        skipped: how many of them were skipped, by type of failure.
        report_path: CSV with id, source, error and message of each skipped entry.
    """

    contents: Contents
    n_entries: int
    skipped: Mapping[str, int]
    report_path: Path


@dataclass(frozen=True, eq=False)
class _Prepared:
    """An image that is ready for the encoder: pixels (3, h, w) uint8."""

    exemplar: Exemplar
    pixels: NDArray[np.uint8]


def build(
    encoder: "Encoder",
    source: Source,
    *,
    collection: str,
    work_dir: Path,
    batch_size: int = 32,
    limits: ImageLimits | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Encode all images of a source.

    A file that cannot be read or decoded is listed in the report and skipped; so is one with the bytes and the label,
    or with the id, of an earlier one. Called again after a kill with the same arguments, it goes on with the first
    unfinished part, unless the source has changed meanwhile: its list, a label, or size or time of a file.

    Args:
        encoder: makes the embeddings.
        source: see `indexer.sources`.
        collection: what the snapshot will be of.
        work_dir: folder of this build; `WorkDir.discard_parts` cleans it once the contents are published.
        batch_size: images encoded at once.
        limits: of an image, default `ImageLimits()`; an animation is indexed by its first frame.
        progress: called with (entries done, entries skipped).

    Raises:
        BuildError: no image could be used; the folder is in use, damaged or of another build; the source changed.
        ContentsError, InvalidLabel, InvalidName: a label or name does not fit the collection.
        EncoderError: the encoder failed on more than single images.
    """
    collection_kind(collection)
    if batch_size < 1:
        raise BuildError(f"batch_size must be at least 1, got {batch_size}")
    limits = limits or ImageLimits()
    folder = WorkDir(work_dir)
    plan: dict[str, str | int] = {
        "collection": collection,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "source": source.identity,
        "batch_size": batch_size,
        "limits": repr(limits),
    }
    with folder.hold(plan):
        parts = _encode_parts(encoder, source, folder, batch_size, limits, progress or (lambda done, skipped: None))
        skipped = [s for part in parts for s in part.outcomes.skipped]
        folder.write_report(skipped)
        exemplars = [e for part in parts for e in part.outcomes.exemplars]
        n_entries = sum(len(part.outcomes.entries) for part in parts)
        if not exemplars:
            raise BuildError(f"none of {n_entries} entries could be used; see {folder.report_path}")
        embeddings = np.concatenate([part.embeddings for part in parts])
        contents = Contents.arrange(collection, encoder.name, encoder.fingerprint, exemplars, embeddings)
    return BuildReport(contents, n_entries, Counter(s.error for s in skipped), folder.report_path)


def _encode_parts(
    encoder: "Encoder", source: Source, folder: WorkDir, batch_size: int, limits: ImageLimits, progress: Progress
) -> list[Part]:
    """Finish the parts that are not there yet; returns all."""
    parts = folder.parts()
    part_entries = batch_size * BATCHES_PER_PART
    entries = iter(source)
    _skip_finished(entries, parts, part_entries, folder.path)
    known = _Known(e for part in parts for e in part.outcomes.exemplars)
    done = sum(len(part.outcomes.entries) for part in parts)
    skipped = sum(len(part.outcomes.skipped) for part in parts)
    progress(done, skipped)
    pool = ThreadPoolExecutor(_WORKERS, "decode")
    try:
        prepared = _prepare_ahead(pool, entries, encoder.preprocess, limits, 2 * batch_size)
        while True:
            part = _PartBuilder(encoder, batch_size, known)
            for key, outcome in islice(prepared, part_entries):
                part.add(key, outcome)
                progress(done + len(part.entries), skipped + len(part.skipped))
            if not part.entries:
                return parts
            parts.append(part.finish())
            folder.save(len(parts) - 1, parts[-1])
            done += len(part.entries)
            skipped += len(part.skipped)
            progress(done, skipped)
    finally:
        pool.shutdown(cancel_futures=True)


def _skip_finished(
    entries: Iterator[SourceItem | Skipped], parts: Sequence[Part], part_entries: int, path: Path
) -> None:
    """Consume the entries that finished parts hold, and make sure that they are the same ones."""
    expected: list[str | None] = [key for part in parts for key in part.outcomes.entries]
    if len(expected) % part_entries:  # a part that is not full was the last one
        expected.append(None)
    for key in expected:
        found = next(entries, None)
        if (found and found.key) != key:
            where = repr(found.id) if found else "its end"
            raise BuildError(f"the source has changed at {where} since the build began; remove {path} to start anew")


def _prepare_ahead(
    pool: ThreadPoolExecutor,
    entries: Iterator[SourceItem | Skipped],
    preprocess: PreprocessSpec,
    limits: ImageLimits,
    ahead: int,
) -> Iterator[tuple[str, _Prepared | Skipped]]:
    """Yield (key, outcome) of the entries in their order, with at most `ahead` of them read but not yet taken."""
    pending: deque[tuple[str, Future[_Prepared | Skipped]]] = deque()
    for entry in entries:
        pending.append((entry.key, pool.submit(_prepare, entry, preprocess, limits)))
        if len(pending) >= ahead:
            key, future = pending.popleft()
            yield key, future.result()
    for key, future in pending:
        yield key, future.result()


def _prepare(entry: SourceItem | Skipped, preprocess: PreprocessSpec, limits: ImageLimits) -> _Prepared | Skipped:
    """Read, decode and resize one file; whatever goes wrong with it is its own fault, except want of memory."""
    if isinstance(entry, Skipped):
        return entry
    try:
        data = entry.read()
        exemplar = Exemplar(entry.id, entry.label, hashlib.sha256(data).hexdigest(), entry.source, entry.metadata)
        return _Prepared(exemplar, preprocess.apply(decode(data, limits).frames[0].image))
    except MemoryError:
        raise
    except Exception as error:  # one file of a million must not end the run, however it was broken
        return Skipped.because(entry.id, entry.source, error)


class _Known:
    """Ids and contents that were taken already."""

    def __init__(self, exemplars: Iterator[Exemplar]) -> None:
        self._ids: set[str] = set()
        self._id_of: dict[tuple[str, str], str] = {}
        for exemplar in exemplars:
            self._take(exemplar)

    def refuse(self, exemplar: Exemplar) -> Skipped | None:
        """Why an exemplar repeats an earlier one; None, and it counts as taken, where it does not."""
        if exemplar.id in self._ids:
            return Skipped.because(exemplar.id, exemplar.source, DuplicateId(exemplar.id))
        earlier = self._id_of.get((exemplar.sha256, exemplar.label))
        if earlier is not None:
            return Skipped(exemplar.id, exemplar.source, "DuplicateImage", f"same bytes and label as {earlier!r}")
        self._take(exemplar)
        return None

    def forget(self, exemplar: Exemplar) -> None:
        """Take one back that the encoder refused: what is known must follow from the finished parts alone."""
        self._ids.remove(exemplar.id)
        del self._id_of[exemplar.sha256, exemplar.label]

    def _take(self, exemplar: Exemplar) -> None:
        self._ids.add(exemplar.id)
        self._id_of[exemplar.sha256, exemplar.label] = exemplar.id


class _PartBuilder:
    """Collects outcomes of consecutive entries, and encodes whenever a batch is full."""

    def __init__(self, encoder: "Encoder", batch_size: int, known: _Known) -> None:
        self._encoder, self._batch_size, self._known = encoder, batch_size, known
        self._batch: list[_Prepared] = []
        self._exemplars: list[Exemplar] = []
        self._embeddings = [np.zeros((0, encoder.dim), np.float32)]
        self.entries: list[str] = []
        self.skipped: list[Skipped] = []

    def add(self, key: str, outcome: _Prepared | Skipped) -> None:
        self.entries.append(key)
        if isinstance(outcome, _Prepared):
            repeated = self._known.refuse(outcome.exemplar)
            if repeated is None:
                self._batch.append(outcome)
                if len(self._batch) == self._batch_size:
                    self._encode()
                return
            outcome = repeated
        self.skipped.append(outcome)

    def finish(self) -> Part:
        self._encode()
        outcomes = Outcomes(tuple(self.entries), tuple(self._exemplars), tuple(self.skipped))
        return Part(outcomes, np.concatenate(self._embeddings))

    def _encode(self) -> None:
        """Encode the batch; an image that the encoder has no finite embedding for is skipped, the others stay."""
        import torch

        batch, self._batch = self._batch, []
        while batch:
            try:
                with torch.inference_mode():
                    embeddings = self._encoder.encode(to_pixels([prepared.pixels for prepared in batch]))
            except NonFiniteEmbedding as error:
                if not error.rows:
                    raise
                for row in error.rows:
                    exemplar = batch[row].exemplar
                    self._known.forget(exemplar)
                    self.skipped.append(Skipped.because(exemplar.id, exemplar.source, error))
                batch = [prepared for row, prepared in enumerate(batch) if row not in error.rows]
                continue
            self._exemplars += [prepared.exemplar for prepared in batch]
            self._embeddings.append(embeddings.cpu().numpy())
            return
