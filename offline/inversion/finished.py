"""A run directory of `invert image` as it was left, read without its plan."""

import json
from dataclasses import dataclass
from pathlib import Path

from offline.errors import RunError
from offline.inversion.store import RESULTS_NAME, Record, Store
from perception.encoder import Precision


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run holds.

    Attributes:
        path: run directory.
        encoders: that reconstructed.
        fingerprints: theirs, by name.
        precision: theirs.
        ids, seeds: each image has a reconstruction of each encoder with each seed.
        store: its files.
    """

    path: Path
    encoders: tuple[str, ...]
    fingerprints: dict[str, str]
    precision: Precision
    ids: tuple[str, ...]
    seeds: tuple[int, ...]
    store: Store

    @classmethod
    def read(cls, path: Path) -> "FinishedRun":
        """Read a run directory.

        Raises:
            RunError: there is none, it is of texts, it is not finished, or it is damaged.
        """
        try:
            plan = json.loads((path / "plan.json").read_text("utf8"))
            kind = plan["invert"]
        except FileNotFoundError as error:
            raise RunError(f"{path} is no run directory of `invert image`: it has no plan.json") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}/plan.json is not that of an inversion: {error!r}") from error
        if kind != "image":
            raise RunError(f"{path} holds an inversion of {kind}s: the table compares images with reconstructions")
        if not (path / RESULTS_NAME).is_file():
            raise RunError(f"{path} is not finished: call `invert image` with the same options to go on")
        try:
            results = json.loads((path / RESULTS_NAME).read_text("utf8"))
            records = [Record.parse(line) for line in results["reconstructions"]]
            encoders, seeds = tuple(plan["encoders"]), tuple(plan["seeds"])
            ids = tuple(image["id"] for image in plan["images"])
            found = cls(
                path, encoders, dict(plan["fingerprints"]), plan["precision"], ids, seeds, Store(path, encoders, ids)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged: {error!r}") from error
        expected = {(encoder, id, seed) for encoder in encoders for id in ids for seed in seeds}
        missing = expected - {(record.encoder, record.target, record.seed) for record in records}
        if missing or not expected:
            raise RunError(f"{path} lacks {len(missing)} of {len(expected)} reconstructions")
        return found
