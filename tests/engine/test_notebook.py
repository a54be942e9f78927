"""The notebook, executed on a real small run: it ends, shows what it promises, and holds no logic and no output."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from continual import ablate

papermill = pytest.importorskip("papermill")

NOTEBOOK = Path(__file__).resolve().parents[2] / "analysis" / "atom_specialization.ipynb"


def cells_of(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def executed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The code cells of the notebook, executed on a run whose atoms were taken out."""
    folder = tmp_path_factory.mktemp("notebook")
    run_dir = shutil.copytree(finished, folder / "run")
    assert ablate.main([str(run_dir)]) == 0
    with pytest.MonkeyPatch.context() as patch:  # the kernel is another process
        patch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        papermill.execute_notebook(
            NOTEBOOK, folder / "out.ipynb", parameters={"run": str(run_dir)}, kernel_name="python3", progress_bar=False
        )
    return cells_of(folder / "out.ipynb")


def test_every_cell_shows_a_picture_or_a_table(executed: list[dict[str, Any]]) -> None:
    shown = {"figure": 0, "table": 0}
    for cell in executed[2:]:  # the parameter, and papermill's own
        (output,) = cell["outputs"]
        assert output["output_type"] == "execute_result", output
        source = "".join(cell["source"])
        is_figure = source.startswith("plots.")
        assert ("image/png" if is_figure else "text/html") in output["data"], source
        shown["figure" if is_figure else "table"] += 1
    assert shown["figure"] >= 9 and shown["table"] >= 5


def test_what_the_run_recorded_is_there(executed: list[dict[str, Any]]) -> None:
    overview = "".join(executed[2]["outputs"][0]["data"]["text/plain"])
    for part in ("usage and entropy", "drift", "tokens", "atoms taken out"):
        assert re.search(rf"^{part} +[1-9]", overview, re.MULTILINE), overview


def test_the_notebook_holds_no_logic_and_no_output() -> None:
    allowed = (ast.Expression, ast.Expr, ast.Call, ast.Attribute, ast.Name, ast.Constant, ast.keyword, ast.Load)
    for index, cell in enumerate(cells_of(NOTEBOOK)):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        source = "".join(cell["source"])
        if index >= 2:  # the parameter and the imports stand before
            (statement,) = ast.parse(source).body
            assert all(isinstance(node, allowed) for node in ast.walk(statement)), source
