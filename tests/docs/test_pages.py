"""README and docs name what is there, and leave nothing out: files, classes, tables, measures, keys, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import continual.adapters
import continual.strategies
from analysis.summaries.summary import KEYS
from continual.config.experiment import make_parser
from continual.storage.records import SCHEMAS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_folders_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./])(?:configs|tests|docs|continual|tasks|analysis)/[\w./-]*\w(?:\.\w+)?", text))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link, _ in links if link and not (path.parent / link).exists()] == []
    for link, anchor in links:
        if anchor:
            target = (path.parent / link if link else path).read_text(encoding="utf-8")
            assert anchor[1:] in anchors_of(target), f"{link}{anchor}"


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_classes_named_by_their_path_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for package, module in (("adapters", continual.adapters), ("strategies", continual.strategies)):
        for name in set(re.findall(rf"continual\.{package}\.([A-Z]\w+)", text)):
            assert hasattr(module, name), f"continual.{package}.{name}"


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 250


def test_the_readmes_configuration_has_ten_lines_each_explained() -> None:
    section = README.split("## Ten lines")[1].split("\n## ")[0]
    block = section.split("```yaml\n")[1].split("```")[0]
    explained = re.findall(r"^\d+\. ", section, re.MULTILINE)
    assert len(block.splitlines()) == len(explained) == 10
    assert list(yaml.safe_load(block)) == ["seed", "model", "trainer", "stages"]


def test_the_tree_names_the_rooms_that_are_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    rooms = {path.parent.name for path in (ROOT / "continual").glob("*/__init__.py")}
    assert named == rooms
    for file in re.findall(r"\b(\w+\.py)\b", tree):
        assert (ROOT / "continual" / file).exists(), file


def test_every_strategy_has_a_row_and_every_row_a_strategy() -> None:
    table = page("reference/strategies.md").split("| `continual.strategies.` |")[1].split("\n\n")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert rows == set(continual.strategies.__all__) - {"Strategy"}


def test_every_configuration_has_a_row() -> None:
    text = page("reference/configurations.md")
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        folder = str(path.parent.relative_to(ROOT))
        assert path.name in text or f"{folder}/*" in text or f"{folder}/order1.yaml` …" in text, path


def test_every_table_of_a_run_has_a_row() -> None:
    table = page("reference/files.md").split("| file |")[1].split("\n\n")[0]
    assert [name for name in SCHEMAS if f"`{name}.parquet`" not in table] == []


def test_every_measure_of_the_summary_has_its_formula() -> None:
    text = page("explanation/measures.md")
    assert [key for key in KEYS if f"`{key}`" not in text] == []


def test_every_key_of_a_configuration_is_named() -> None:
    block = page("reference/configuration.md").split("```yaml\n")[1].split("```")[0]
    assert set(yaml.safe_load(block)) == set(vars(make_parser().get_defaults()))


def test_every_command_has_its_help_on_the_page() -> None:
    helped = set(re.findall(r"^```\{command-help\} (\S+)", page("reference/command-line.md"), re.MULTILINE))
    doors = {
        f"continual.{path.stem}" for path in (ROOT / "continual").glob("*.py") if "\ndef main(" in path.read_text()
    }
    assert helped == doors | {"analysis.report"}
