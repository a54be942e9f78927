"""Score a finished run's tasks with each atom of its bank taken out in turn; nothing of the run is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from continual.adapters import QueryableLoraConfig, QueryableLoraModel
from continual.adapters.growing.bank import SlicedBank
from continual.callbacks import ScoreRecorder
from continual.config import experiment
from continual.config.experiment import Experiment
from continual.data.stage_data import StageData
from continual.engine.stage_loop import StageLoop
from continual.errors import ConfigError
from continual.storage import digests, manifest, records
from continual.storage.manifest import Manifest

Rows = dict[str, list[dict[str, Any]]]
"""Rows of the table ``ablation``, without their atom, by task."""
Answers = dict[tuple[str, int], str]
"""What was answered, by task and row."""


def ablate(run_dir: Path, accept_data: bool = False) -> None:
    """Write ``ablation.parquet`` into the directory of a finished run.

    Raises:
        ConfigError: There is no run, it is not finished, or its adapter has no atoms of which one could go.
    """
    state, text = manifest.read_finished(run_dir)

    made = experiment.parse(text, state.run, where=str(run_dir / manifest.CONFIG_NAME))
    _check(made, run_dir)
    made.wordings, made.general_ability, made.token_sample = None, False, 0
    loop = AtomScores(made, run_dir)
    with loop.lock:
        records.rewrite(run_dir, "ablation", loop.score(state, accept_data))
        digests.note_tables(run_dir, state, ["ablation"])


def _check(made: Experiment, run_dir: Path) -> None:
    adapter = made.model.adapter
    if not isinstance(adapter, QueryableLoraConfig):
        raise ConfigError(
            f"{run_dir} has no atoms to take out: its adapter, {type(adapter).__name__}, keeps no bank of them"
        )
    if adapter.num_atoms == 1:
        raise ConfigError(f"{run_dir} has one atom (a slice): without it there is nothing to route to")


class AtomScores(StageLoop):
    """A run that takes up its last adapter as it is, and trains no more."""

    def _take_up(self) -> None:
        index = self.manifest.finished_stage
        self.module.strategy.load(self.module, self._strategy_folder(index))
        self.module.strategy.load_adapter(self.module, self._adapter_folder(index))

    def score(self, state: Manifest, accept_data: bool = False) -> list[dict[str, Any]]:
        """Return the rows of the table ``ablation``: all tasks' scores and answers without an atom, for each atom."""
        self.prepare(state, accept_data)
        self._see_labels(state.finished_stage)
        tuner = cast(QueryableLoraModel, self.module.tuner)
        growing = cast(SlicedBank | None, tuner.growing)
        # A growing bank's atoms stand behind the weight of no slice in use, as they do in recorded routes.
        first = 0 if growing is None else 1
        slices = list(tuner.queryable_bank) if growing is None else growing.names
        num_atoms = cast(Any, self.module.adapter).num_atoms
        recorder = self._scored(self.data, "all atoms")
        chosen = recorder.chosen
        whole = _rows_of(recorder, self.data, {})
        answers = {(answer["task"], answer["row"]): answer["prediction"] for answer in recorder.answers}
        rows = [row | {"atom": -1} for own in whole.values() for row in own]
        for place, name in enumerate(slices):
            users = set() if growing is None else {s for s, a in growing.gate.stages.items() if name in a.adapters}
            touched = [data for data in self.data if growing is None or users & chosen.get(data.name, {}).keys()]
            for local in range(num_atoms):
                title = f"without atom {place * num_atoms + local + 1} of {len(slices) * num_atoms}"
                left = whole
                if touched:
                    with tuner.without_atom(local, name):
                        left = whole | _rows_of(self._scored(touched, title), touched, answers)
                atom = first + place * num_atoms + local
                rows += [row | {"atom": atom} for own in left.values() for row in own]
        return rows

    def _scored(self, tasks: list[StageData], title: str) -> ScoreRecorder:
        self.progress.title = title
        return self.score_tasks(self.manifest.finished_stage, tasks)


def _rows_of(recorder: ScoreRecorder, tasks: list[StageData], whole: Answers) -> Rows:
    """Return the scores, and where ``whole`` holds other answers of the same rows, how many of them changed."""
    rows: Rows = {data.name: [] for data in tasks}
    kinds = {data.name: data.task.kind for data in tasks}
    for score in recorder.rows:
        if score["direction"] != "none":
            rows[score["task"]].append(score | {"row": -1})
    for answer in recorder.answers:
        direction = "lower" if kinds[answer["task"]] == "regression" else "higher"
        measured = {"metric": "answer", "direction": direction, "count": 1}
        rows[answer["task"]].append({k: v for k, v in answer.items() if k != "prediction"} | measured)
    for name, own in rows.items():
        given = [answer for answer in recorder.answers if answer["task"] == name and kinds[name] != "regression"]
        if given:
            changed = [answer["prediction"] != whole[name, answer["row"]] for answer in given if whole]
            measured = {"metric": "changed", "direction": "none", "count": len(given)}
            keys = {key: given[0][key] for key in ("run", "seed", "stage", "task")}
            own.append(keys | {"row": -1, "value": sum(changed) / len(given)} | measured)
    return rows
