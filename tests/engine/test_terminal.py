"""What every command shares: one line and a status for what fails around it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from continual.commands.terminal import guarded

ROOT = Path(__file__).resolve().parents[2]


def failing(error: BaseException) -> Callable[[], Path]:
    def work() -> Path:
        raise error

    return work


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(failing(OSError(number, os.strerror(number), "runs/mine/scores.parquet"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and os.strerror(number) in line and "runs/mine/scores.parquet" in line


def test_other_faults_are_not_hidden() -> None:
    with pytest.raises(OSError, match="Connection refused"):
        guarded(failing(OSError(errno.ECONNREFUSED, "Connection refused")))
    with pytest.raises(ZeroDivisionError):
        guarded(failing(ZeroDivisionError()))


CODE = """
import sys
from pathlib import Path
from continual.commands.terminal import guarded

def work():
    for _ in range(20_000):
        print("stage \N{SNOWMAN}", flush=True)
    return Path("runs/mine")

sys.exit(guarded(work))
"""


def run(command: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=variables, capture_output=True, cwd=ROOT)


def test_a_reader_that_leaves_is_one_line() -> None:
    shell = f"{sys.executable} -c '{CODE}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = run(["bash", "-c", shell])
    assert done.returncode == 1 and done.stdout.decode() == "stage \N{SNOWMAN}\n"
    assert done.stderr.decode() == "error: nobody reads the output any more; go on with --resume\n"


def test_a_terminal_without_the_letters_shows_others() -> None:
    done = run([sys.executable, "-c", CODE], PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith(b"stage \\u2603\n") and not done.stderr
