"""The report of whole runs: its files and exact numbers, what it says of incomplete runs, and every bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from math import log
from pathlib import Path

import numpy as np
import pytest

import analysis
from analysis import load, load_run, summarise
from analysis.report import write_report
from analysis.report.command import main
from analysis.report.figures import report_figures
from analysis.report.page import _plain
from analysis.runs import tables
from analysis.summaries.summary import KEYS
from continual.storage import records

MakeRun = Callable[..., Path]
TINY = {"names": ["one", "two"], "num_atoms": 4, "num_blocks": 2, "num_rows": 20, "num_steps": 6}
FIGURES = {
    *("score_matrix", "score_curves", "atom_usage", "usage_drift", "usage_drift_since_trained", "routing_entropy"),
    *("specialists", "separation_matrix", "separation_by_stage", "route_drift", "sharing", "drift_against_loss"),
    *("training_loss", "gradient_norms", "gradient_concentration", "atoms_by_task", "moves"),
}


def summary_of(page: Path) -> dict:
    return json.loads(page.with_name("summary.json").read_text(encoding="utf-8"))


def test_every_file_is_written(small_report: Path) -> None:
    folder = small_report.parent
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "summary.json", "figures"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")
    }
    assert all(path.stat().st_size > 2000 for path in (folder / "figures").iterdir())


def test_the_page_asks_no_network(small_report: Path) -> None:
    page = small_report.read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|xlink:href|action|data)\s*=\s*["']([^"']*)""", page)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]{0,20})", page))
    assert "@import" not in page and "fetch(" not in page and '<link rel="stylesheet' not in page


def test_every_figure_has_alternative_text(small_report: Path) -> None:
    page = small_report.read_text(encoding="utf-8")
    assert len(re.findall(r'<svg role="img" aria-label="[^"]{20,}"', page)) == page.count("<svg") == len(FIGURES)
    text = small_report.with_name("report.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^\]]{20,}\]\((figures/[a-z_0-9]+\.png)\)", text)
    assert len(named) == len(FIGURES) and all((small_report.parent / name).is_file() for name in named)


def test_the_same_run_gives_the_same_bytes(small_report: Path, small_run: Path) -> None:
    files = [path for path in sorted(small_report.parent.rglob("*")) if path.is_file()]
    before = [path.read_bytes() for path in files]
    write_report(small_run)
    assert [path.read_bytes() for path in files] == before


def test_the_command_prints_the_page_last(make_run: MakeRun) -> None:
    run = make_run(finished=-1, **TINY)
    done = subprocess.run([sys.executable, "-m", "analysis.report", str(run)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == str(run / "report" / "report.html")


def test_text_format_prints_the_markdown(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(finished=-1, **TINY)
    assert main([str(run), "--format", "text"]) == 0
    assert capsys.readouterr().out.strip() == (run / "report" / "report.md").read_text(encoding="utf-8").strip()


def test_nothing_imports_torch() -> None:
    check = "import sys, analysis, analysis.report.command, analysis.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# A run worked by hand: R and the routes of three tasks over two atoms in one block.
SCORES = [[0.1, 0.2, 0.3], [0.8, 0.3, 0.3], [0.6, 0.9, 0.5], [0.7, 0.5, 0.6]]
EVEN, FIRST, SECOND = (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)
ROUTES = [[EVEN, EVEN, EVEN], [FIRST, EVEN, EVEN], [EVEN, SECOND, EVEN], [EVEN, SECOND, FIRST]]


def write_by_hand(directory: Path) -> Path:
    names = ["a", "b", "c"]
    scores, usage = [], []
    for stage, task in np.ndindex(4, 3):
        key = {"run": "by-hand", "seed": 7, "stage": stage, "task": names[task]}
        scores.append(key | {"metric": "accuracy", "direction": "higher", "value": SCORES[stage][task], "count": 10})
        scores.append(key | {"metric": "exact_match", "direction": "higher", "value": 0.0, "count": 10})
        for atom, share in enumerate(ROUTES[stage][task]):
            usage.append(
                key | {"block": 0, "atom": atom, "metric": "usage", "direction": "none", "value": share, "count": 9}
            )
    records.append(directory, "scores", scores)
    records.append(directory, "routing", usage)
    tasks = {name: {"metric": "accuracy", "higher_is_better": True, "constant_score": 0.2} for name in names}
    manifest = {"run": "by-hand", "seed": 7, "stages": names, "finished_stage": 3, "complete": True, "tasks": tasks}
    manifest["model"] = {"trainable_parameters": 123, "num_atoms": 2}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_summary_worked_by_hand(tmp_path: Path) -> None:
    found = summarise(load_run(write_by_hand(tmp_path))).to_json()
    e = 1e-6
    even_second = 0.5 * log(0.5 * (1 + 2 * e) / e) + 0.5 * log(0.5 * (1 + 2 * e) / (1 + e))
    second_even = (e * log(2 * e / (1 + 2 * e)) + (1 + e) * log(2 * (1 + e) / (1 + 2 * e))) / (1 + 2 * e)
    second_first = log((1 + e) / e) / (1 + 2 * e)
    half = 0.5 * log(4 / 3) + 0.25 * log(2 / 3) + 0.25 * log(2)  # JS of EVEN and FIRST
    expected = {
        "average_accuracy": 0.6,
        "backward_transfer": -0.25,
        "forward_transfer": 0.15,
        "forgetting": 0.25,
        "average_incremental_accuracy": (0.8 + 0.75 + 0.6) / 3,
        "learning_accuracy": 2.3 / 3,
        "routing_entropy_nats": log(2) / 3,
        "route_drift": half / 3,
        "kl_separation": (2 * even_second + 2 * second_even + 2 * second_first) / 6,
        "dead_atoms": 0,
        "trainable_parameters": 123,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["intransigence"] is None and "joint" in found["reasons"]["intransigence"]
    assert found["score_matrix"] == SCORES
    assert (found["run"], found["seed"], found["stages"], found["tasks"]) == (
        "by-hand",
        7,
        ["a", "b", "c"],
        ["a", "b", "c"],
    )
    assert set(KEYS) <= set(found)


def test_a_joint_run_gives_intransigence(tmp_path: Path) -> None:
    assert summarise(load_run(write_by_hand(tmp_path)), joint=[0.85, 0.9, 0.8]).values[
        "intransigence"
    ] == pytest.approx(0.2)


def test_recorded_distances_equal_those_computed_from_usage(make_run: MakeRun) -> None:
    run = make_run(**TINY)
    recorded = summarise(load_run(run)).values
    (run / "separation.parquet").unlink()
    (run / "drift.parquet").unlink()
    computed = summarise(load_run(run))
    nulls = {"kl_separation_null", "js_separation_null", "route_drift_null"}  # they need the rows' halves
    assert all("split-half" in computed.reasons[key] for key in nulls)
    kept = set(recorded) - nulls
    assert {key: recorded[key] for key in kept} == pytest.approx({key: computed.values[key] for key in kept})


def test_frames_of_the_tables(small_run: Path) -> None:
    run = load_run(small_run)
    usage = tables.usage_array(run)
    assert usage is not None and usage.shape == (4, 3, 2, 6)
    assert tables.usage(usage, run.stages).groupby(["stage", "task"], observed=True)[
        "value"
    ].sum().to_numpy() == pytest.approx(1)
    since = tables.usage_change(usage, run.stages, "trained")
    own = since[(since["task"] == run.stages[0]) & (since["stage"] == 3)]["value"].to_numpy()
    assert own == pytest.approx((usage[3, 0] - usage[1, 0]).mean(axis=0))
    assert since[since["task"] == run.stages[2]].empty
    drift = tables.drift(run)
    assert drift[drift["metric"] == "js"]["null"].notna().all()
    assert tables.task_names(drift) == run.stages


def test_load_takes_a_directory_or_a_glob(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run("one", **TINY)
    make_run("two", finished=1, **TINY)
    (tmp_path / "notes.txt").write_text("no run")
    assert len(load(tmp_path / "*").scores) == len(load(one).scores) + len(load(tmp_path / "two").scores)
    assert [run.finished_stage for run in load(tmp_path / "*").runs] == [2, 1]
    with pytest.raises(analysis.RunReadError, match="names no run"):
        load(tmp_path / "nothing*")


def test_markup_is_escaped_everywhere(make_run: MakeRun) -> None:
    planted = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    run = make_run(**TINY | {"names": ["a<b>&'$x_1$", "t|wo](http://x)"]}, instructions=[planted, "line\nbreak | pipe"])
    page = write_report(run)
    html, text = page.read_text(encoding="utf-8"), page.with_name("report.md").read_text(encoding="utf-8")
    assert html.count("<script") == 1 and "<img" not in html and "&lt;script&gt;" in html and "a<b>" not in html
    assert "<script" not in text and "<img" not in text and "<b>" not in text
    assert "line break \\| pipe" in text and "](http" not in text


@pytest.mark.parametrize("text", ["x < 1 & y > 2", "p <= 0.05", "a<-b", "R&D", "0 < p, q->r", "5 > 4; 3<4"])
def test_signs_that_open_no_markup_are_read_as_written(text: str) -> None:
    assert _plain(text) == text


@pytest.mark.parametrize("text", ["<b>", "</b>", "<!-- x", "<?x", "&lt;b>", "&#60;b>", "> quoted"])
def test_signs_that_open_markup_are_escaped(text: str) -> None:
    escaped = _plain(text)
    assert escaped != text and unescape(escaped) == text
    assert not re.search(r"<[A-Za-z/!?]|&(?!lt;|gt;|amp;)|^>", escaped)


@pytest.mark.usefixtures("sketched")
def test_an_unfinished_run_is_reported_over_its_finished_stages(make_run: MakeRun) -> None:
    run = make_run(finished=2, **TINY | {"names": ["one", "two", "three"]})
    left_behind = [
        {
            "run": "r",
            "seed": 0,
            "stage": 3,
            "task": "one",
            "metric": "score",
            "direction": "higher",
            "value": 9.0,
            "count": 1,
        }
    ]
    records.append(run, "scores", left_behind)
    page = write_report(run)
    found = summary_of(page)
    assert "2 of 3 stages" in page.read_text(encoding="utf-8") and found["complete"] is False
    matrix = np.array(found["score_matrix"])
    assert matrix.shape == (3, 3)
    assert found["average_accuracy"] == pytest.approx(matrix[2, :2].mean())
    assert found["backward_transfer"] == pytest.approx(matrix[2, 0] - matrix[1, 0])


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize(("finished", "drawn"), [(-1, set()), (0, {"score_matrix", "score_curves", "atom_usage"})])
def test_a_run_without_a_finished_stage_still_has_a_report(make_run: MakeRun, finished: int, drawn: set[str]) -> None:
    page = write_report(make_run(finished=finished, **TINY))
    found = summary_of(page)
    assert all(found[key] is None for key in KEYS if key != "trainable_parameters")
    assert "No stage is finished yet" in page.read_text(encoding="utf-8")
    assert drawn <= {path.stem for path in (page.parent / "figures").iterdir()}


@pytest.mark.usefixtures("sketched")
def test_one_stage(make_run: MakeRun) -> None:
    page = write_report(make_run(**TINY | {"names": ["one"]}))
    found = summary_of(page)
    undefined = ("backward_transfer", "forward_transfer", "forgetting", "route_drift", "kl_separation")
    assert all(found[key] is None and found["reasons"][key] == "it needs two finished stages" for key in undefined)
    assert found["average_accuracy"] == found["learning_accuracy"] == found["score_matrix"][1][0]
    text = page.with_name("report.md").read_text(encoding="utf-8")
    assert "Cannot be shown:** it needs a stage after the one that trained a task" in text


@pytest.mark.usefixtures("sketched")
def test_a_run_without_routes_says_so(make_run: MakeRun) -> None:
    page = write_report(make_run(routes=False, **TINY))
    found = summary_of(page)
    assert all(found[key] is None for key in ("routing_entropy_nats", "route_drift", "kl_separation", "dead_atoms"))
    assert found["average_accuracy"] is not None
    assert "the run recorded no routes (LoraConfig" in page.read_text(encoding="utf-8")
    assert {path.stem for path in (page.parent / "figures").iterdir()} == FIGURES - {
        *(
            "atom_usage",
            "usage_drift",
            "usage_drift_since_trained",
            "routing_entropy",
            "specialists",
            "separation_matrix",
        ),
        *("separation_by_stage", "route_drift", "sharing", "drift_against_loss", "atoms_by_task", "moves"),
    }


def test_regression_shows_r2_and_rmse(make_run: MakeRun) -> None:
    page = write_report(make_run(metrics=["r2", "r2"], routes=False, **TINY))
    found = summary_of(page)
    assert found["score_matrix"][0][0] < -10 and found["average_accuracy"] is not None
    text = page.with_name("report.md").read_text(encoding="utf-8")
    assert "Beside the headline scores" in text and "rmse" in text
    assert "−2" in (page.parent / "figures" / "score_matrix.svg").read_text(encoding="utf-8")


@pytest.mark.usefixtures("sketched")
def test_unlike_scales_are_not_averaged(make_run: MakeRun) -> None:
    page = write_report(make_run(metrics=["r2", "accuracy"], routes=False, **TINY))
    found = summary_of(page)
    assert found["average_accuracy"] is found["backward_transfer"] is found["forgetting"] is None
    assert "unlike scales" in found["reasons"]["average_accuracy"] and "unlike scales" in page.read_text(
        encoding="utf-8"
    )
    assert summarise(load_run(make_run("both", metrics=["score", "accuracy"], routes=False, **TINY))).values[
        "average_accuracy"
    ]


def test_a_lower_is_better_headline_is_not_averaged(make_run: MakeRun) -> None:
    run = make_run(routes=False, **TINY)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tasks"]["one"]["higher_is_better"] = False
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "better when lower" in summarise(load_run(run)).reasons["forgetting"]


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("cut", [["routing"], ["scores"], ["separation", "drift", "gradients", "answers"]])
def test_a_truncated_table_leaves_the_rest_intact(
    make_run: MakeRun, cut: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(**TINY)
    whole = summarise(load_run(run)).values
    for table in cut:
        path = run / f"{table}.parquet"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main([str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith("report.html")
    lines = printed.err.splitlines()
    assert len(lines) == len(cut) and all(any(f"{table}.parquet" in line for line in lines) for table in cut)
    page = run / "report" / "report.html"
    html, found = page.read_text(encoding="utf-8"), summary_of(page)
    assert all(f"{table}.parquet: not a readable parquet file" in html for table in cut)
    assert str(run) not in html
    lost = {"scores": {"average_accuracy", "forgetting"}, "routing": {"dead_atoms", "routing_entropy_nats"}}
    gone = set().union(*(lost.get(table, set()) for table in cut))
    assert all(found[key] is None for key in gone)
    kept = {
        "average_accuracy",
        "forgetting",
        "dead_atoms",
        "routing_entropy_nats",
        "kl_separation",
        "route_drift",
    } - gone
    assert {key: found[key] for key in kept} == pytest.approx({key: whole[key] for key in kept})


@pytest.mark.parametrize("kind", ["missing", "empty", "broken", "foreign"])
def test_a_directory_that_is_no_run(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "nothing"
    if kind != "missing":
        directory.mkdir()
    if kind in ("broken", "foreign"):
        (directory / "manifest.json").write_text("{" if kind == "broken" else '{"name": 1}')
    assert main([str(directory)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and str(directory) in printed.err
    assert not (directory / "report").exists()


@pytest.mark.usefixtures("sketched")
def test_an_earlier_figure_that_no_longer_holds_is_taken_away(make_run: MakeRun) -> None:
    run = make_run(**TINY)
    figures = write_report(run).parent / "figures"
    assert (figures / "training_loss.png").exists()
    (run / "gradients.parquet").unlink()
    write_report(run)
    assert not (figures / "training_loss.png").exists() and (figures / "score_matrix.png").exists()


@pytest.mark.parametrize(("num_tasks", "num_atoms"), [(2, 4), (9, 64)])
def test_every_figure_draws_at_any_size(make_run: MakeRun, num_tasks: int, num_atoms: int) -> None:
    names = [f"a_rather_long_task_name_{index}" for index in range(num_tasks)]
    run = make_run(**TINY | {"names": names, "num_atoms": num_atoms})
    drawn = [content for content in report_figures(summarise(load_run(run))) if content.draw is not None]
    assert {content.name for content in drawn} == FIGURES
    for content in drawn:
        assert content.draw is not None
        figure = content.draw()
        assert figure.get_figwidth() <= 10 and figure.get_axes()
