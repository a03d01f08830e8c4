"""Audits: what the routes about robustness audits share."""

from dataclasses import dataclass, field

from service.audit_fit import PoolsHash
from service.audit_records import AuditRecords
from service.audit_runs import AuditRuns


@dataclass
class Audits:
    """The folder of audits, the records of the one that was tried last, and the hash of the pools that serve.

    Attributes:
        runs: the folder.
        records: of its runs.
        pools: that serve.
    """

    runs: AuditRuns
    records: AuditRecords = field(init=False)
    pools: PoolsHash = field(default_factory=PoolsHash)

    def __post_init__(self) -> None:
        """Read records where the runs are."""
        self.records = AuditRecords(self.runs)
