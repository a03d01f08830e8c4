import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_kill_9_at_any_point_leaves_the_old_version_or_the_new_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_publisher.py")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    *trials, (old, new) = (json.loads(line) for line in done.stdout.splitlines())
    assert old != new
    seen = [trial["version"] for trial in trials]
    assert [trial["killed"] for trial in trials] == [True] * (len(trials) - 1) + [False]
    assert len(trials) > 30
    switch = seen.index(new)
    assert switch > 20
    assert seen == [old] * switch + [new] * (len(seen) - switch)
    for trial in trials:
        assert trial["problems"] == []
        assert trial["afterwards"] == new
        assert trial["left over"] == []
        assert trial["rolled back"] == old
