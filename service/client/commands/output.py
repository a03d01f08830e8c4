"""What the commands print: a line of JSON, or lines for a person in which nothing can steer a terminal."""

import sys
from collections.abc import Iterable

from pydantic import BaseModel

from service.client.records import json_line, printable


def print_json(answer: BaseModel) -> None:
    """An answer as one line of JSON."""
    _write(json_line(answer.model_dump(mode="json")))


def print_line(*parts: object) -> None:
    """Parts with two spaces between them; None and what is empty is left out."""
    _write("  ".join(printable(str(part)) for part in parts if part not in (None, "")) + "\n")


def print_ids(title: str, ids: Iterable[str]) -> None:
    """A line for each id."""
    for id in ids:
        print_line(title, id)


def _write(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()
