"""WorkDir: what an unfinished build leaves behind, and how it goes on after a kill.

It holds `plan.json` (what is built; another plan is refused), `parts/00000.safetensors` and so on (embeddings of
consecutive entries of the source, and what became of each entry: one file, so that a part is there whole or not at
all), `report.csv` (what was skipped, once all parts are there) and `.lock` (held while a build runs).
"""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from indexer.contents import Exemplar
from indexer.durable import exclusive, make_folder, replace_file
from indexer.errors import BuildError, IndexerError
from indexer.sources import Skipped

_PART = re.compile(r"(\d{5,})\.safetensors")


@dataclass(frozen=True)
class Outcomes:
    """What became of consecutive entries of a source.

    Attributes:
        entries: keys of all of them, in order.
        exemplars: those that were encoded.
        skipped: the others.
    """

    entries: tuple[str, ...]
    exemplars: tuple[Exemplar, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """Outcomes, and the embeddings (m, d) float32 of their exemplars."""

    outcomes: Outcomes
    embeddings: NDArray[np.float32]


_OUTCOMES_ADAPTER = TypeAdapter(Outcomes)


class WorkDir:
    """The folder of one build."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report_path = path / "report.csv"
        self._plan = path / "plan.json"
        self._parts = path / "parts"

    @contextmanager
    def hold(self, plan: Mapping[str, str | int]) -> Iterator[None]:
        """Claim the folder for a build of this plan.

        Raises:
            BuildError: another build runs in it, or it holds the parts of another plan.
        """
        make_folder(self._parts)
        try:
            with exclusive(self.path / ".lock", wait=False):
                self._check_plan(plan)
                yield
        except BlockingIOError:
            raise BuildError(f"another build is running in {self.path}") from None

    def parts(self) -> list[Part]:
        """The finished parts, in order.

        Raises:
            BuildError: one is damaged or missing.
        """
        numbers = sorted(int(m[1]) for path in self._parts.iterdir() if (m := _PART.fullmatch(path.name)))
        if numbers != list(range(len(numbers))):
            raise BuildError(f"parts are missing in {self._parts}; remove {self.path} and build anew")
        return [self._read(number) for number in numbers]

    def save(self, number: int, part: Part) -> None:
        """Write one part, whole or not at all."""
        # The outcomes are a tensor of bytes, since safetensors limits its header, and metadata may be long.
        outcomes = np.frombuffer(json.dumps(asdict(part.outcomes)).encode(), np.uint8)
        data = safetensors.numpy.save({"embeddings": part.embeddings, "outcomes": outcomes})
        replace_file(self._path_of(number), data)

    def write_report(self, skipped: Iterable[Skipped]) -> None:
        """Write report.csv: one line for each entry that was skipped."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(("id", "source", "error", "message"))
        table.writerows((s.id, s.source, s.error, s.message) for s in skipped)
        replace_file(self.report_path, text.getvalue().encode("utf-8", "backslashreplace"))

    def discard_parts(self) -> None:
        """Forget plan and parts, once what they made is published; the report stays."""
        self._plan.unlink(missing_ok=True)
        shutil.rmtree(self._parts)

    def _check_plan(self, plan: Mapping[str, str | int]) -> None:
        text = json.dumps(plan, indent=2, sort_keys=True) + "\n"
        if not any(self._parts.iterdir()):
            replace_file(self._plan, text.encode())
            return
        try:
            recorded = self._plan.read_text()
            found = json.loads(recorded)
        except (OSError, ValueError) as error:
            raise BuildError(f"{self._plan} cannot be read: {error}; remove {self.path} and build anew") from error
        if recorded != text:
            other = [f"{key} {found.get(key)!r}, not {plan[key]!r}" for key in plan if found.get(key) != plan[key]]
            raise BuildError(f"{self.path} holds an unfinished build of another plan: {'; '.join(other)}")

    def _path_of(self, number: int) -> Path:
        return self._parts / f"{number:05d}.safetensors"

    def _read(self, number: int) -> Part:
        path = self._path_of(number)
        try:
            with safe_open(path, framework="numpy") as file:
                outcomes = _OUTCOMES_ADAPTER.validate_json(file.get_tensor("outcomes").tobytes())
                return Part(outcomes, file.get_tensor("embeddings"))
        except (OSError, SafetensorError, ValidationError, IndexerError) as error:
            raise BuildError(f"{path} is damaged: {error}; remove {self.path} and build anew") from error
