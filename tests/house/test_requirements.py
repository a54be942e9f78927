"""The lock and the floors: what `make setup` and `make test-oldest` install by."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import floors
import lock
import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("lock-*.txt"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def named(requirements: list[str]) -> set[str]:
    return {str(re.match(r"[\w.-]+", each)[0]).lower().replace("_", "-") for each in requirements}  # type: ignore[index]


def test_each_python_has_a_lock() -> None:
    assert [path.stem for path in LOCKS] == [f"lock-{version}" for version in lock.PYTHONS]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_every_requirement_to_a_public_version(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    project = tomllib.loads(PYPROJECT)["project"]
    extras = project["optional-dependencies"]
    assert named([*project["dependencies"], *extras["dev"], *extras["docs"]]) <= named(lines)
    assert {"torch==2.13.0", *lock.MODELS} <= {*lines}


def test_a_lock_leaves_out_what_a_gpu_machine_brings() -> None:
    compiled = "torch==2.13.0+cpu\n    # via -r x\nnvidia-cublas==13.0\ntriton==3.4\n--find-links x\nPyYAML==6.0\n"
    assert lock.locked(compiled) == ["PyYAML==6.0", "torch==2.13.0"]


def test_floors_hold_all_but_torch_at_the_least_that_is_allowed() -> None:
    found = floors.floors(PYPROJECT, "torch==9.9\ntorchmetrics==1.0\n")
    assert "torch==9.9" in found and "torchmetrics==1.0" not in found
    assert not any(line.startswith("ruff") for line in found)
    floor = re.search(r'"transformers>=([\w.]+)', PYPROJECT)
    assert floor and f"transformers=={floor[1]}" in found


def test_a_requirement_without_a_floor_is_named() -> None:
    text = '[project]\ndependencies = ["numpy"]\n[project.optional-dependencies]\ndev = []\n'
    with pytest.raises(ValueError, match="'numpy' names no floor"):
        floors.floors(text, "")
