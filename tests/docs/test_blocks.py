"""Every shell and Python block of README, CONTRIBUTING and docs is executed, page by page, in a folder of its own.

An HTML comment before a block says more of it:

    <!-- with: key=value ... -->    what its commands get besides, so that they take seconds
    <!-- file: NAME -->             the block is a file, which later blocks of the page use
    <!-- needs: gpu, data -->       it is not executed, for want of these here: its configurations are parsed instead
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from continual import run
from continual.config import experiment
from continual.sweeps import cells

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]

NEEDS = {
    "README.md": ["minutes"],
    "CONTRIBUTING.md": ["network", "minutes", "minutes, network"],
    "docs/devices.md": ["gpus, data", "gpus, data", "slurm, data", "gpus, data"],
    "docs/explanation/measures.md": ["network"],
    "docs/howto/atoms.md": ["kernel"],
    "docs/howto/four-bits.md": ["network", "minutes"],
    "docs/howto/growing-bank.md": ["data, gpu"],
    "docs/howto/reworded-prompts.md": ["data, gpu"],
    "docs/howto/own-data.md": ["hub", "hub"],
    "docs/howto/resume.md": ["minutes"],
    "docs/howto/several-gpus.md": ["gpus, data", "gpus, slurm, data", "gpus, data"],
    "docs/howto/speed.md": ["gpu, data", "gpu, data", "gpu"],
    "docs/howto/studies.md": ["minutes", "hub, gpu", "hub, gpu", "hub, gpu"],
    "docs/howto/sweeps.md": ["data, gpu", "network", "ray-cluster, data", "slurm, data"],
    "docs/performance.md": ["minutes"],
    "docs/reference/command-line.md": ["minutes"],
    "docs/reference/configurations.md": ["data, gpu"],
    "docs/results.md": ["data, gpu", "data, minutes", "minutes", "data, gpu", *["minutes"] * 4],
    "docs/tutorial.md": ["network", "minutes"],
}
"""What blocks need that is not here. A block that is to be executed must not slip in among them unseen."""

DOORS = {"analysis.report": "analysis.report.command"}  # a package, whose door is a module in it
SHOWN = {"", "text", "{toctree}", "{eval-rst}", "{command-help}", "{record-tables}"}  # output, and what Sphinx fills in
_FENCE = re.compile(r"^```(\{?[\w-]*\}?)\s*(.*)$")
_NOTE = re.compile(r"^<!-- (with|file|needs): (.*) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, what a directive names, its text and the notes before it."""

    place: str
    language: str
    argument: str
    text: str
    notes: dict[str, str]


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page, in order."""
    found, notes, inside = list[Block](), dict[str, str](), list[str]()
    opened: tuple[int, str, str] | None = None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        if opened is not None:
            if line != "```":
                inside.append(line)
                continue
            found.append(Block(f"{page}:{opened[0]}", opened[1], opened[2], "\n".join(inside) + "\n", notes))
            opened, notes, inside = None, {}, []
        elif fence := _FENCE.match(line):
            opened = (number, fence[1], fence[2])
        elif note := _NOTE.match(line):
            notes[note[1]] = note[2]
        else:
            assert not line.startswith("<!--"), f"{page}:{number}: no note that is known: {line}"
            assert not (line and notes), f"{page}:{number}: a note has to stand right before its block"
    assert opened is None, f"{page}: a block is not closed"
    return found


def commands_of(text: str) -> list[list[str]]:
    """Return the commands of a shell block as words; of a loop, its first round."""
    lines = text.replace("\\\n", " ").splitlines()
    inner = [line for line in lines if not re.match(r"\s*(for .*; do|done)$", line)]
    return [words for line in inner if (words := shlex.split(line.replace("$seed", "0"), comments=True))]


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the module that a command runs, also through a launcher, and its arguments; None for other commands."""
    if "-m" not in words:
        return None
    at = words.index("-m")
    return words[at + 1], words[at + 2 :]


def configuration_of(arguments: list[str]) -> str | None:
    """Return the YAML file that a command starts from."""
    return next((word for word in arguments if word.endswith(".yaml")), None)


# -- what is executed -------------------------------------------------------------------------------------------------


def execute(block: Block, names: dict[str, Any]) -> None:
    """Do what a block says, in the working directory."""
    if "needs" in block.notes:
        check(block)
    elif block.language == "{literalinclude}":
        source = (ROOT / block.place).parent / block.argument
        write(block.notes["file"], source.read_text(encoding="utf-8"))
    elif "file" in block.notes:
        write(block.notes["file"], block.text)
        if block.language in ("yaml", "json"):
            read(block)
    elif block.language == "python":
        exec(compile(block.text, block.place, "exec"), names)
    elif block.language == "bash":
        for words in commands_of(block.text):
            call(words, shlex.split(block.notes.get("with", "")), block.place)
    elif block.language in ("yaml", "json"):
        read(block)
    else:
        assert block.language in SHOWN, f"{block.place}: nobody knows what to do with {block.language!r}"


def read(block: Block) -> Any:
    return (yaml.safe_load if block.language == "yaml" else json.loads)(block.text)


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def call(words: list[str], further: list[str], place: str) -> None:
    """Run a command in this process: a new one would import torch again."""
    if words[:2] == ["source", ".venv/bin/activate"]:
        return
    found = module_of(words)
    assert found and words[0] == "python", f"{place}: cannot execute {' '.join(words)}; does it need something?"
    module, arguments = found
    if configuration_of(arguments):
        arguments = [*arguments, *further]
    if module == "continual.sweep":
        arguments += ["--jobs", "1"]
    try:
        status = importlib.import_module(DOORS.get(module, module)).main(arguments)
    except SystemExit as end:  # --print_config
        status = end.code
    assert not status, f"{place}: {' '.join(words)} ended with status {status}"


def check(block: Block) -> None:
    """Check a block that cannot be executed: its configurations, its targets, its files."""
    for words in commands_of(block.text):
        found = module_of(words)
        if found is not None:
            parse(*found)
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert words[1] in targets, f"{block.place}: make has no target {words[1]}"
        elif words[0] in ("python", "papermill", "pytest"):
            assert (ROOT / words[1]).exists(), f"{block.place}: there is no {words[1]}"
        else:
            assert words[0] in ("pip", "source", "pre-commit"), f"{block.place}: {words[0]} is not checked"


def parse(module: str, arguments: list[str]) -> None:
    """Read the configuration that a command names, with its overrides; a sweep's base with what it sets for all."""
    overrides = tuple(word for word in arguments if re.match(r"[\w.*]+=", word))
    config = configuration_of(arguments)
    if "--resume" in arguments:  # it was configured before
        return
    assert config is not None, arguments
    if module == "continual.run":
        assert stages_of(config, overrides)
    else:
        assert module == "continual.sweep", module
        sweep = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        changes = [f"{key}={json.dumps(value)}" for key, value in sweep.get("set", {}).items()]
        base = Path(config).parent / sweep["base"]
        assert stages_of(str(base), (*changes, *overrides))


@cache
def stages_of(config: str, overrides: tuple[str, ...]) -> int:
    """Return how many stages a shipped configuration has with overrides; pages say the same more than once."""
    return len(experiment.load(ROOT / config, overrides).stages)


def in_this_process(cell: cells.CellRun, arguments: list[str], log: IO[bytes]) -> int:
    """Take the place of the process of a sweep's cell."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = run.main(arguments)
    log.write(printed.getvalue().encode())
    log.flush()
    return status


@pytest.fixture
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketched: None) -> Iterator[None]:
    """A folder to work in that has the shipped configurations, from which modules of one's own are imported."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.setattr(cells, "call_run", in_this_process)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_do_what_they_say(page: str, at_work: None) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        execute(block, names)


def test_blocks_that_need_what_is_not_here_are_these() -> None:
    found = {page: [b.notes["needs"] for b in blocks_of(page) if "needs" in b.notes] for page in PAGES}
    assert {page: needs for page, needs in found.items() if needs} == NEEDS


@pytest.mark.parametrize("page", PAGES)
def test_code_stands_in_fenced_blocks(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\n\n    \S.*", text) == []
    assert re.findall(r"^~~~.*", text, re.MULTILINE) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a \\\n  b  # why\n\n# nothing\n", [["a", "b"]]),
        ("for seed in 0 1; do\n  python -m x seed=$seed\ndone\n", [["python", "-m", "x", "seed=0"]]),
    ],
)
def test_commands_are_read_as_a_shell_does(text: str, words: list[list[str]]) -> None:
    assert commands_of(text) == words


def test_a_wrong_block_is_found(at_work: None) -> None:
    wrong: list[Callable[[], None]] = [
        lambda: execute(Block("x", "python", "", "assert False\n", {}), {}),
        lambda: execute(Block("x", "bash", "", "python -m continual.run configs/smoke.yaml sed=1\n", {}), {}),
        lambda: execute(Block("x", "bash", "", "rm -r x\n", {}), {}),
        lambda: execute(Block("x", "bash", "", "make everything\n", {"needs": "minutes"}), {}),
        lambda: execute(Block("x", "bash", "", "python -m continual.run configs/no.yaml\n", {"needs": "gpu"}), {}),
        lambda: execute(Block("x", "klingon", "", "", {}), {}),
    ]
    for each in wrong:
        with pytest.raises((AssertionError, ValueError)):
            each()
