"""Freed memory stays with the process: allocating again what was freed costs no page faults."""

import subprocess
import sys

import pytest

_JOB = """
import resource, sys
from perception.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
import numpy as np
def fill():
    return [np.ones(16 * 2**20, np.uint8) for _ in range(8)]
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    result = subprocess.run([sys.executable, "-c", _JOB, how], capture_output=True, text=True, check=False)
    if result.returncode == 3:
        pytest.skip("the C library has no mallopt, or refuses these settings")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_memory_that_was_freed_is_used_again() -> None:
    assert faults("keep") < faults("leave") / 10
