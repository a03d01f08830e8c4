"""What the commands of `hardlook-lab` share: the meaning of options, and files that they read and write."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

DataFolder = Annotated[Path | None, Parameter(help="Folder with train/, bench/, weights/. Default: $HARDLOOK_DATA.")]
EncoderName = Annotated[str, Parameter(help="Catalogue name, 'hf-hub:...', 'local-dir:...' or 'visual:...'.")]
EncoderNames = Annotated[list[str], Parameter(help="Repeat for several; catalogue name, 'local-dir:...' and so on.")]
JsonFile = Annotated[Path | None, Parameter(name="--json", help="Also write the figures to this file.")]
Precision = Literal["fp32", "bf16"]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a plan.

    Raises:
        PlanError: it is no TOML.
        OSError: it cannot be read.
    """
    from offline.errors import PlanError

    try:
        return tomllib.loads(path.read_text("utf8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is no TOML: {error}") from error


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures to the file that was asked for, if any."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; all by default."""
    import torch

    if threads:
        torch.set_num_threads(threads)
