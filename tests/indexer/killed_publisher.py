"""Run by test_kill.py: publishes a second version again and again, and is killed one step later each time.

A step is every file-system call below the store's root, every sync, and the middle of every write. For each step a
child process is forked that sends itself SIGKILL there; then the store is loaded and described in one line of JSON.
Usage: killed_publisher.py FOLDER
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from indexer import durable, snapshot
from indexer.contents import Contents, Exemplar
from indexer.store import SnapshotStore


def contents(seed: int) -> Contents:
    rows = np.random.default_rng(seed).normal(size=(9, 4))
    embeddings = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    exemplars = [Exemplar(str(i), ("safe", "unsafe")[i % 2]) for i in range(9)]
    return Contents.arrange("pools", "toy", "f", exemplars, embeddings)


class Fuse:
    """Kills this process at its n-th step."""

    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps_left = str(root), steps

    def burn(self, emptying: Path | None = None) -> None:
        """One step; `emptying` is a file that is lost for a moment when it is opened to be overwritten."""
        self.steps_left -= 1
        if self.steps_left < 0:
            self.root = "/nothing below which anything is audited"
            if emptying is not None and emptying.exists():
                os.truncate(emptying, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        touches_files = event == "open" or event.startswith(("os.", "shutil."))
        if touches_files and event != "os.kill" and any(str(argument).startswith(self.root) for argument in arguments):
            self.burn()
            if event == "open" and arguments[2] & os.O_TRUNC:
                self.burn(emptying=Path(arguments[0]))

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def burning(*arguments: Any) -> Any:
            self.burn()
            return function(*arguments)

        return burning

    def in_the_middle(self, path: Path, data: bytes) -> None:
        with path.open("xb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            self.burn()
            file.write(data[len(data) // 2 :])
            file.flush()
            os.fsync(file.fileno())


def publish_and_die(root: Path, steps: int) -> None:
    fuse = Fuse(root, steps)
    for module in (durable, snapshot):
        vars(module)["write_file"] = fuse.in_the_middle
    os.fsync = fuse.before(os.fsync)
    sys.addaudithook(fuse.audit)
    SnapshotStore(root, "pools").publish(contents(2))


def main(folder: Path) -> None:
    SnapshotStore(folder / "clean", "pools").publish(contents(1))
    steps, killed = 0, True
    while killed:
        root = folder / str(steps)
        shutil.copytree(folder / "clean", root)
        child = os.fork()
        if not child:
            publish_and_die(root, steps)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        store = SnapshotStore(root, "pools")
        found = {"killed": killed, "version": store.load("f").version, "problems": store.verify()}
        store.publish(contents(2))
        found["afterwards"] = store.load("f").version
        found["left over"] = [p.name for p in (root / "pools" / "versions").iterdir() if p.name.startswith(".")]
        found["rolled back"] = store.rollback()
        print(json.dumps(found), flush=True)
        shutil.rmtree(root)
        steps += 1
    print(json.dumps([SnapshotStore(folder / "clean", "pools").current_version(), found["afterwards"]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
