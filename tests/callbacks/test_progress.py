"""What a person sees: the plan, the bars, and one row of scores after each stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from tqdm import tqdm

from continual.callbacks import StageProgress, progress
from continual.callbacks.progress import ScoreTable, plan


def test_the_plan_names_stages_rows_steps_and_parameters(make_module, make_data) -> None:
    module = make_module()
    long = "a_stage_of_a_rather_long_name_indeed"
    data = [
        make_data(module, "labels", "one", num_rows=21, batch_size=4, validation_rows=4),
        make_data(module, "free", long, num_rows=5),
    ]
    stages = [SimpleNamespace(name=each.name, epochs=epochs) for each, epochs in zip(data, (3, 1), strict=True)]
    experiment = SimpleNamespace(model=module, epochs=lambda stage: stage.epochs, trainer={})
    counts = {"trainable_parameters": 1234, "total_parameters": 100_000}
    first, model, heading, one, other = plan(experiment, list(zip(stages, data, strict=True)), counts, "DIR").split(
        "\n"
    )
    assert first == "Run DIR"
    assert model.split(" ", 2)[2] == "tiny-random with QueryableLoraConfig: 1,234 of 100,000 parameters train (1.23%)"
    assert heading.split("  ")[1:] and heading.split()[:2] == ["stage", "task"]
    assert one.split() == ["1", "one", "accuracy", "17", "21", "15"]  # 17 rows in batches of 4, 3 times
    assert other.split() == ["2", long, "score", "5", "5", "1"]
    assert len(heading) == len(one) == len(other)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_one_row_a_stage_with_the_trained_score_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    table = ScoreTable(["one", "two"])
    table.show("(untrained)", {"one": 0.1, "two": 0.25})
    table.show("one", {"one": 1.0, "two": 0.3})
    table.show("two", {"two": 0.5, "one": 0.75})
    heading, *rows = shown(capsys)
    assert heading.split() == ["scores", "after", "one", "two"]
    assert [row.split() for row in rows] == [
        ["(untrained)", "0.100", "0.250"],
        ["one", "[1.000]", "0.300"],
        ["two", "0.750", "[0.500]"],
    ]


@pytest.mark.parametrize("score", [0.5, -12.3456, -123456.0, -99.9999, float("nan"), 1e-9])
def test_long_names_and_wild_scores_keep_the_columns(score: float, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a_stage_of_a_rather_long_name_indeed"
    names = ["one", f"{long}_1", f"{long}_2", "t"]
    table = ScoreTable(names)
    for title in ["(untrained)", *names]:
        table.show(title, dict.fromkeys(names, score))
    heading, untrained, *rows = shown(capsys)
    assert {len(row) for row in (untrained, *rows)} == {len(heading)}
    ends = [heading.index(name) + len(name) for name in (f"{long}_1", f"{long}_2")]
    assert "[" not in untrained
    for place, row in enumerate(rows):
        cells = row[28:].split()
        assert [cell.startswith("[") and cell.endswith("]") for cell in cells] == [i == place for i in range(4)]
        assert all(row[end : end + 2].isspace() for end in ends)  # the gap behind a column stays a gap
    assert len({row[:28] for row in rows}) == 3  # the two long names are cut to one text; the brackets tell them apart


class Bar(tqdm):
    """A bar that remembers itself and is always about to be drawn."""

    made: list[Bar] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"mininterval": 0.0})
        self.closed, self.texts = False, []
        self.made.append(self)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Remember the text."""
        self.texts.append(s)
        super().set_postfix_str(s, refresh)

    def close(self) -> None:
        """Remember the end."""
        self.closed = True
        super().close()


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """The bars that are opened from now on."""
    Bar.made = []
    monkeypatch.setattr(progress, "tqdm", Bar)
    return Bar.made


def test_a_bar_for_training_and_one_for_scoring(
    bars: list[Bar], make_module, make_data, make_trainer, run_test, capfd: pytest.CaptureFixture[str]
) -> None:
    module = make_module()
    data = make_data(module, num_rows=8, batch_size=2, eval_batch_tokens=1)
    shows = StageProgress()
    shows.title = "stage 1/2 one"
    make_trainer(shows, max_epochs=2, accumulate_grad_batches=2).fit(module, datamodule=data)
    run_test(module, [data, data], shows)
    train, score = bars
    assert (train.desc, train.total, train.n, train.unit) == ("stage 1/2 one: end of stage: ", 4, 4, "step")
    assert (score.desc, score.total, score.n) == ("stage 1/2 one: score", 16, 16)
    assert train.closed and score.closed
    assert all(text.startswith("loss ") for text in train.texts) and train.texts
    assert float(train.texts[0].split()[1]) > 4  # nats a token, of 259: not divided among the batches of a step
    captured = capfd.readouterr()
    assert "stage 1/2 one" not in captured.out  # standard output is for the plan and the scores


def test_a_bar_stays_while_a_method_ends_its_stage(bars: list[Bar], make_module, make_data, make_trainer) -> None:
    seen: list[tuple[str, int, bool]] = []

    def look(*_: Any) -> None:
        seen.extend((bar.desc, bar.n, bar.closed) for bar in bars)

    looks: Any = L.Callback()
    looks.on_train_start = looks.on_train_end = look

    module = make_module()
    shows = StageProgress()
    shows.title = "stage 1/2 one"
    data = make_data(module, num_rows=4, batch_size=2)
    make_trainer(shows, looks, max_epochs=1).fit(module, datamodule=data)
    assert seen == [("stage 1/2 one: train", 0, False), ("stage 1/2 one: end of stage: ", 2, False)]
    assert bars[0].closed


def test_an_error_closes_the_bar(bars: list[Bar], make_module, make_data, make_trainer) -> None:
    module = make_module()
    data = make_data(module, num_rows=4, batch_size=2)

    def broken(*given: Any) -> Any:
        raise RuntimeError("broken")

    module.loss = broken
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(StageProgress(), max_epochs=1).fit(module, datamodule=data)
    assert [bar.closed for bar in bars] == [True]
