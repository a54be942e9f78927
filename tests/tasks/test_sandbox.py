"""Generated programs: what passes, what does not, and that neither hurts the machine that asks."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import PassesTests, TaskError, sandbox

GOOD = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(2) == 4", "assert double(-1) == -2\nassert double(0) == 0"]
QUICK = sandbox.Limits(seconds=2.0)
CHILD = Path(sandbox.__file__).with_name("child.py")
HAS_FILTER = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def test_a_program_passes_with_all_of_its_tests_and_not_with_some() -> None:
    assert sandbox.passes(GOOD, TESTS)
    assert sandbox.passes("import math, re, collections, heapq, itertools, datetime\r\n" + GOOD, TESTS)
    assert sandbox.passes("print('noise ' * 100_000)\nopen('/dev/null').read()\n" + GOOD, TESTS)
    assert not sandbox.passes("def double(x):\n    return 4", TESTS)
    assert not sandbox.passes(GOOD, [*TESTS, "assert double('a') == 'a'"])


@pytest.mark.parametrize(
    "program",
    [
        "def double(x) return 2 * x",
        "(" * 100_000,
        "\0",
        "",
        "def double(x):\n    return double(x)",
        "def double(x):\n    return 2 * (",
        "import numpy\n" + GOOD,
        "raise KeyboardInterrupt",
    ],
)
def test_a_program_that_fails_by_itself_is_no_pass(program: str) -> None:
    assert not sandbox.passes(program, TESTS, QUICK)


@pytest.mark.parametrize(
    "leaving",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit(0)",
        "quit()" if sys.flags.no_site else "raise SystemExit",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit, os; atexit.register(lambda: os._exit(0)); raise SystemExit(0)",
        "import builtins; builtins.exec = lambda *a: None\ndef double(x): return 5",
        "import os; [os.write(fd, b'passed kernel') for fd in range(3, 9)]",
        "def double(x):\n    import os\n    os._exit(0)",
        "def double(x):\n    raise SystemExit(0)",
    ],
)
def test_leaving_early_is_no_pass(leaving: str) -> None:
    bad = leaving if "double" in leaving else f"{leaving}\ndef double(x): return 5"
    assert not sandbox.passes(bad, TESTS, QUICK)


def test_a_right_program_that_leaves_before_its_tests_is_no_pass() -> None:
    for leaving in ("import sys; sys.exit(0)", "import os; os._exit(0)"):
        assert not sandbox.passes(f"{GOOD}\n{leaving}", TESTS, QUICK)


def children() -> set[str]:
    """Return the processes that this one has started and not waited for."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True:\n    try:\n        1 / 0\n    except BaseException: pass",
    ],
    ids=["spins", "sleeps", "catches everything"],
)
def test_an_endless_program_ends_at_its_limit(program: str) -> None:
    started, before = time.monotonic(), children()
    assert not sandbox.passes(program, TESTS, sandbox.Limits(seconds=1.0))
    assert time.monotonic() - started < 5
    assert children() == before  # nothing is left to wait for


def test_a_memory_hog_is_stopped_at_its_limit() -> None:
    hog = "kept = []\nwhile True: kept.append(bytearray(10**7))"
    assert not sandbox.passes(hog, TESTS, sandbox.Limits(seconds=10.0, memory_mib=256))
    large = f"kept = bytearray(3 * 10**8)\n{GOOD}"
    assert not sandbox.passes(large, TESTS, sandbox.Limits(memory_mib=256))
    assert sandbox.passes(large, TESTS)


# Each must be refused by an OSError, PermissionError among them, for the program to go on and pass.
REFUSED = {
    "fork": "os.fork()",
    "program": "import subprocess; subprocess.run(['true'])",
    "shell": "if os.system('true'): raise OSError",
    "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "socket": "socket.socket()",
    "resolve": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))",
    "pair": "socket.socketpair()",
    "kill": "os.kill(os.getppid(), 0)",
    "write": "open(TARGET, 'w')",
    "append": "os.open(TARGET, os.O_WRONLY | os.O_APPEND)",
    "truncate": "os.truncate(TARGET, 0)",
    "remove": "os.remove(TARGET)",
    "rename": "os.rename(TARGET, TARGET + '.moved')",
    "link": "os.symlink(TARGET, TARGET + '.link')",
    "folder": "os.mkdir(TARGET + '.folder')",
    "mode": "os.chmod(TARGET, 0)",
    "here": "open('here.txt', 'w')",
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target.txt"
    path.write_text("as it was")
    return path


def attempt(what: str, target: Path) -> str:
    """A program that goes on only where ``what`` is refused."""
    return (
        f"import os, socket\nTARGET = {str(target)!r}\n"
        f"try:\n    {REFUSED[what]}\nexcept OSError:\n    pass\nelse:\n    raise SystemExit('not refused')\n"
    )


def untouched(target: Path) -> bool:
    return target.read_text() == "as it was" and list(target.parent.iterdir()) == [target]


def test_what_reaches_outside_is_refused_and_the_parent_unhurt(target: Path) -> None:
    for what in REFUSED:
        assert sandbox.passes(attempt(what, target) + GOOD, TESTS), what
        assert untouched(target), what
    assert sandbox.passes(
        f"import os\nassert dict(os.environ).keys() <= {{'PYTHONHASHSEED', 'LC_CTYPE'}}\n{GOOD}", TESTS
    )
    assert sandbox.passes(f"import os\nassert not os.listdir()\n{GOOD}", TESTS)
    for module in ("ctypes", "_posixsubprocess"):
        assert not sandbox.passes(f"import {module}\n{GOOD}", TESTS), module


def test_a_fork_bomb_makes_no_process() -> None:
    bomb = "import os\nfor _ in range(10_000):\n    try: os.fork()\n    except OSError: pass\n"
    assert sandbox.passes(bomb + GOOD, TESTS)  # not one fork worked, or many processes would have told their verdict
    assert not sandbox.passes("import multiprocessing\nmultiprocessing.Process(target=print).start()\n" + GOOD, TESTS)


LAYERS = [
    pytest.param(
        "assert child.filter_system_calls()",
        id="kernel",
        marks=pytest.mark.skipif(not HAS_FILTER, reason="no filter for this system"),
    ),
    pytest.param("sys.addaudithook(child.refuse)", id="interpreter"),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_refuses_by_itself(layer: str, target: Path, tmp_path: Path) -> None:
    opening = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('child', {str(CHILD)!r})\n"
        "child = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(child)\n"
    )
    for what in REFUSED:
        program = attempt(what, target)
        body = f"{opening}import os, socket\n{layer}\nexec({program!r})\nos._exit(7)"
        done = subprocess.run([sys.executable, "-B", "-c", body], cwd=tmp_path, capture_output=True, timeout=30)
        assert done.returncode == 7, (what, done.stderr.decode()[-300:])
        assert untouched(target), what


def test_the_filter_refuses_calls_of_another_architecture_and_fits_its_jumps() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("sandbox_child", CHILD)
    assert spec is not None and spec.loader is not None
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    for machine in child._MACHINES:
        program = child.filter_program(machine)
        assert len(program) < 4096 and program[-1][0] == child._RETURN  # the kernel's limit; every path ends
        for place, (code, yes, no, _) in enumerate(program):
            assert code == child._RETURN or place + 1 + max(yes, no) < len(program)


def test_programs_are_not_run_unless_asked_for(target: Path) -> None:
    judge = PassesTests()
    with pytest.raises(TaskError, match=r"run_generated_code=true") as caught:
        judge.check()
    assert "\n" not in str(caught.value)
    with pytest.raises(TaskError, match="may not run"):
        judge.score(GOOD, TESTS)
    asked = PassesTests(run_generated_code=True)
    asked.check()
    assert asked.score(f"Here it is:\n```python\n{GOOD}```\nIt doubles.", TESTS) == 1.0
    assert asked.score("I cannot do that.", TESTS) == 0.0
    assert asked.facts()["isolation"] == ("kernel" if HAS_FILTER else "interpreter")


def test_a_sandbox_in_which_nothing_runs_says_so() -> None:
    with pytest.raises(TaskError, match="cannot run programs: an empty program does not pass"):
        PassesTests(run_generated_code=True, memory_mib=1).check()
    for wrong in ({"seconds": 0}, {"memory_mib": 0}):
        with pytest.raises(TaskError, match="positive limits"):
            PassesTests(**wrong)  # type: ignore[arg-type]
