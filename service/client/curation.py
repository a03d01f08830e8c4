"""Looking collections through: duplicates, contradictions, probes, and pool files out and in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from service.client.calls import RAW, Call, Saved, file_call, given, json_call, path_of
from service.client.images import read_file
from service.client.parts import Part, WayT, asked
from service.wire_curation import ContradictionsAnswer, DuplicatesAnswer, ImportAnswer, ProbeAnswer, ProbeBody

OnConflict = Literal["skip", "refuse", "replace"]
MAX_POOL_FILE_BYTES = 1024 * 1024 * 1024


class Curation(Part[WayT]):
    """What to clean up, and files to take elsewhere. Needs the scope `pools:write`.

    All raise ConnectionFailed, AnswerNotUnderstood and ProblemError; ValueError for what no service takes.
    """

    @asked
    def duplicates(
        self,
        collection: str,
        *,
        min_similarity: float | None = None,
        label: str | None = None,
        limit: int | None = None,
    ) -> Call[DuplicatesAnswer]:
        """Groups of near-duplicates within each pool, with the one to keep. Nothing is changed.

        Args:
            collection: to look through.
            min_similarity: cosine from which two are near-duplicates, 0.8 to 1.
            label: only within this pool or class.
            limit: the most groups.
        """
        params = given(min_similarity=min_similarity, label=label, limit=limit)
        return Call("GET", path_of("collections", collection, "duplicates"), DuplicatesAnswer, params)

    @asked
    def contradictions(self, collection: str = "pools", *, limit: int | None = None) -> Call[ContradictionsAnswer]:
        """Exemplars whose nearest neighbour lies in another pool, worst first. Nothing is changed."""
        path = path_of("collections", collection, "contradictions")
        return Call("GET", path, ContradictionsAnswer, given(limit=limit))

    @asked
    def probe(
        self,
        collection: str,
        prompts: str | Sequence[str],
        *,
        negatives: Sequence[str] = (),
        k: int = 20,
        min_similarity: float = -1.0,
    ) -> Call[ProbeAnswer]:
        """Exemplars that texts describe: candidates for a pool. Needs an encoder with a text tower.

        Args:
            collection: to look in.
            prompts: what to look for, such as 'a photo of a rifle'.
            negatives: exemplars that one of these describes at least as well are left out.
            k: the most candidates of each prompt.
            min_similarity: leave out what is less similar, -1 to 1.
        """
        body = ProbeBody(
            prompts=[prompts] if isinstance(prompts, str) else list(prompts),
            negatives=list(negatives),
            k=k,
            min_similarity=float(min_similarity),
        )
        return json_call("POST", path_of("collections", collection, "probes"), ProbeAnswer, body)

    @asked
    def export_file(self, collection: str, path: Path, *, label: str | None = None) -> Call[Saved]:
        """Write a collection, or one pool of it, to a new pool file: embeddings and ids, no pixels, a checksum.

        Raises:
            OSError: the file is there already, or cannot be written.
        """
        place = path_of("collections", collection, "file")
        return file_call(place, Path(path), RAW, given(label=label))

    @asked
    def import_file(
        self, collection: str, path: Path, *, on_conflict: OnConflict = "refuse", reason: str = ""
    ) -> Call[ImportAnswer]:
        """Take in a pool file of the same encoder; the collection is made where there is none.

        Args:
            collection: to take it into.
            path: of the file.
            on_conflict: what to do about ids that are there with something else: keep that, refuse all, replace.
            reason: why; kept in the audit log.

        Raises:
            ImageUnreadable: the file cannot be read here.
        """
        params = given(on_conflict=on_conflict, reason=reason or None)
        content = read_file(Path(path), MAX_POOL_FILE_BYTES)
        place = path_of("collections", collection, "file")
        return Call("POST", place, ImportAnswer, params, content=content, content_type=RAW)
