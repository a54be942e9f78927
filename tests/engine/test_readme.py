"""What the README and the docs name is there: classes, files, modules of the house, keys of commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import continual.adapters
import continual.strategies

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:configs|tests|docs|continual|tasks|analysis)/[\w./-]*\w(?:\.\w+)?", text))
    assert named, page
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_classes_named_by_their_path_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for package, module in (("adapters", continual.adapters), ("strategies", continual.strategies)):
        for name in set(re.findall(rf"continual\.{package}\.([A-Z]\w+)", text)):
            assert hasattr(module, name), f"continual.{package}.{name}"


def test_every_strategy_has_a_row_and_every_row_a_strategy() -> None:
    table = README.split("| `continual.strategies.` |")[1].split("\n\n")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert rows == set(continual.strategies.__all__) - {"Strategy"}


def test_the_house_holds_the_modules_that_it_names() -> None:
    tree = README.split("## The house")[1].split("```")[1]
    found = {
        path.name for folder in ("continual", "tasks", "analysis", "docs") for path in (ROOT / folder).rglob("*.*")
    }
    assert sorted(set(re.findall(r"\b[\w-]+\.(?:py|ipynb|md)\b", tree)) - found) == []
