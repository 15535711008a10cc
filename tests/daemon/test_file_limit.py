"""The limit of open descriptors, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
from sllm_vllm.daemon.file_limit import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "expected"), [(64, 64, 64), (64, 512, 512), (512, 512, 512)])
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int, expected: int) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(soft), str(hard)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert found.split() == [str(expected), str(hard)]
