"""Key files for tests."""

import json
from pathlib import Path
from typing import Any

from service.key_file import create_key
from service.settings import Scope


def make(path: Path, name: str = "a", scopes: tuple[Scope, ...] = ("classify",), **changes: Any) -> str:
    """A new key; `changes` go into its record as they are."""
    key, record = create_key(path, name, scopes, None, None)
    if changes:
        content = json.loads(path.read_text())
        next(entry for entry in content["keys"] if entry["id"] == record.id).update(changes)
        path.write_text(json.dumps(content))
    return key


def key_of(folder: Path, *scopes: Any, **changes: Any) -> str:
    """A new key in the file `keys.json` of a folder."""
    return make(folder / "keys.json", scopes=scopes, **changes)
