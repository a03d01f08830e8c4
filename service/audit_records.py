"""The records of an audit: the evidence on every image, from which any decision policy can be replayed.

Owns which records belong together, and what they must have so that a replay is worth anything. The evidence of one run
and system is kept in memory, so that one policy can be tried after the other.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isclose

from perception.replay import AttackSetting, Audited
from perception.verdict import Neighbor, PoolLabel, VerdictLabel
from service.audit_files import RECORDS, RecordLine, RunDamaged, finished_lines, opened_folder, parsed
from service.audit_reading import AuditedSystem, AuditRun
from service.audit_runs import AuditRuns
from service.errors import AuditUnusable, InvalidParameter

MAX_IMAGES = 100_000
"""Records of one system that are kept in memory, over all of its settings."""
_LARGEST = 1.001  # of a cosine that was rounded
_LABELS = {"safe": VerdictLabel.SAFE, "unsafe": VerdictLabel.UNSAFE}
_POOLS = frozenset(map(str, PoolLabel))


@dataclass(frozen=True)
class Images:
    """The evidence of one system.

    Attributes:
        by_setting: images by how they were attacked, in the order in which the run came to them.
        recorded: the most neighbours of one pool that any record has, or that the plan asks for: at most so many can
            vote in a replay.
    """

    by_setting: Mapping[AttackSetting, tuple[Audited, ...]]
    recorded: int

    def chosen(self, wanted: AttackSetting | None, headline: AttackSetting | None) -> AttackSetting:
        """A setting that was audited.

        Args:
            wanted: the one; None for that of the headline.
            headline: as the plan says it: an l2 radius is scaled with the side of the encoder's input.

        Raises:
            InvalidParameter: it was not audited; names those that were.
        """
        for setting in self.by_setting:
            if wanted is not None and _same(setting, wanted):
                return setting
        if wanted is not None:
            known = "; ".join(map(str, self.by_setting))
            raise InvalidParameter("setting", f"{wanted} was not audited; there are: {known}")
        if headline in self.by_setting:
            assert headline is not None  # None is no setting
            return headline
        like = [s for s in self.by_setting if headline is None or (s.norm, s.steps) == (headline.norm, headline.steps)]
        return max(like or self.by_setting)


def _same(setting: AttackSetting, wanted: AttackSetting) -> bool:
    alike = (setting.norm, setting.steps) == (wanted.norm, wanted.steps)
    return alike and isclose(setting.eps, wanted.eps, rel_tol=1e-6)


@dataclass
class AuditRecords:
    """Reads records; threads may share it, and wait for each other. Every method is not for the event loop.

    Attributes:
        runs: whose records.
    """

    runs: AuditRuns
    _known: tuple[AuditRun, str, Images] | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def of(self, run: AuditRun, name: str) -> Images:
        """The images of one system, from memory where they were asked for last and the run has not changed.

        Args:
            run: as `AuditRuns` gave it.
            name: of the system.

        Raises:
            InvalidParameter: the run has no such system.
            AuditUnusable: nothing can be replayed: the run is no finished one of pools, or its records are damaged.
        """
        system = _usable(run, name)
        with self._lock:
            # Runs are equal as long as their files are: another object is another state of the folder.
            if self._known is None or self._known[0] is not run or self._known[1] != name:
                self._known = None  # what is not needed any more makes room first
                self._known = (run, name, self._read(run, system))
            return self._known[2]

    def _read(self, run: AuditRun, system: AuditedSystem) -> Images:
        assert system.noted is not None
        try:
            with opened_folder(self.runs.path_of(run)) as folder:
                lines = (parsed(RECORDS, line, RecordLine) for _, line in finished_lines(folder, RECORDS))
                found = _grouped((line for line in lines if line.system == system.name), system.noted.fingerprint)
        except RunDamaged as error:
            raise AuditUnusable(run.id, str(error)) from error
        except OSError as error:
            raise AuditUnusable(run.id, f"the folder cannot be opened: {error.strerror}") from error
        if not found:
            raise AuditUnusable(run.id, f"{RECORDS} has no record of the system {system.name!r}")
        for setting, images in found.items():
            if len(images) != system.noted.items:
                raise AuditUnusable(
                    run.id, f"{RECORDS} has {len(images)} of {system.noted.items} images of {system.name!r} ({setting})"
                )
            missing = set(_LABELS.values()) - {image.label for image in images}
            if missing:
                raise AuditUnusable(run.id, f"the audit has no images that are {', '.join(sorted(missing))}")
        most = max(_most_of_a_pool(image.clean) for images in found.values() for image in images)
        return Images(found, max(most, run.neighbors))


def _usable(run: AuditRun, name: str) -> AuditedSystem:
    """A system of which a policy can be replayed; errors are those of `AuditRecords.of`."""
    if run.state != "finished":
        raise AuditUnusable(run.id, f"it is {run.state}: {'; '.join(run.problems)}")
    system = run.system(name)
    if system is None:
        known = ", ".join(repr(system.name) for system in run.systems)
        raise InvalidParameter("system", f"the audit has no system {name!r}; there are: {known}")
    if run.task != "moderation" or system.noted is None or system.noted.gallery_sha256 is None:
        raise AuditUnusable(run.id, f"the system {name!r} was not audited with pools, so that no policy can be tried")
    return system


def _grouped(lines: Iterable[RecordLine], fingerprint: str) -> dict[AttackSetting, tuple[Audited, ...]]:
    """Images by setting; of a record that was written twice the last counts.

    Raises:
        RunDamaged: a record is of another encoder, has no neighbours, or holds what no policy can decide from; or
            there are too many.
    """
    found: dict[AttackSetting, dict[tuple[str, str], Audited]] = {}
    texts: dict[str, str] = {}  # ids come again and again: each is kept once
    for count, line in enumerate(lines):
        if count >= MAX_IMAGES:
            raise RunDamaged(RECORDS, f"has more than {MAX_IMAGES} records of the system, which is the limit")
        if line.fingerprint != fingerprint:
            raise RunDamaged(RECORDS, f"has a record of another encoder than its run: {line.id!r}")
        label = _LABELS.get(line.label)
        if label is None:
            raise RunDamaged(RECORDS, f"has a record with the label {line.label!r}: {line.id!r}")
        clean, attacked = (_checked(line.id, each.neighbors, texts) for each in (line.clean, line.attacked))
        of = found.setdefault(AttackSetting(line.norm, line.eps, line.steps), {})
        of[line.set, line.id] = Audited(label, clean, attacked)
    return {setting: tuple(images.values()) for setting, images in found.items()}


def _checked(id: str, neighbors: tuple[Neighbor, ...], texts: dict[str, str]) -> tuple[Neighbor, ...]:
    if not neighbors:
        raise RunDamaged(RECORDS, f"has a record without neighbours: {id!r}")
    for neighbor in neighbors:
        if neighbor.pool not in _POOLS or not -_LARGEST <= neighbor.similarity <= _LARGEST:
            raise RunDamaged(RECORDS, f"has a neighbour that is none: {neighbor!r} of {id!r}"[:300])
    return tuple(
        Neighbor(texts.setdefault(n.id, n.id), texts.setdefault(n.pool, n.pool), n.similarity) for n in neighbors
    )


def _most_of_a_pool(neighbors: tuple[Neighbor, ...]) -> int:
    pools = [neighbor.pool for neighbor in neighbors]
    return max(pools.count(pool) for pool in set(pools))
