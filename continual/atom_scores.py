"""Score a finished run's tasks with each atom of its bank taken out in turn; nothing of the run is changed."""

from __future__ import annotations

from typing import Any, cast

import lightning as L

from continual.adapters import QueryableLoraModel
from continual.callbacks import ScoreRecorder
from continual.manifest import Manifest
from continual.sequence import Sequence
from continual.stage_data import AllTasks, StageData

Rows = dict[str, list[dict[str, Any]]]
"""Rows of the table ``ablation``, without their atom, by task."""
Answers = dict[tuple[str, int], str]
"""What was answered, by task and row."""


class AtomScores(Sequence):
    """A run that takes up its last adapter as it is, and trains no more."""

    def _take_up(self) -> None:
        index = self.manifest.finished_stage
        self.module.strategy.load(self.module, self._strategy_folder(index))
        self.module.strategy.load_adapter(self.module, self.run_dir / "adapters" / f"stage-{index:02d}")

    def score(self, state: Manifest) -> list[dict[str, Any]]:
        """Return the rows of the table ``ablation``: all tasks' scores and answers without an atom, for each atom."""
        self.prepare(state)
        self._see_labels(state.finished_stage)
        tuner = cast(QueryableLoraModel, self.module.tuner)
        growing = tuner.growing
        # A growing bank's atoms stand behind the weight of no slice in use, as they do in recorded routes.
        first = 0 if growing is None else 1
        slices = list(tuner.queryable_bank) if growing is None else growing.names
        num_atoms = cast(Any, self.module.adapter).num_atoms
        self.answers: Answers = {}
        watcher = _Stages()
        whole = self._scored(self.data, "all atoms", watcher)
        rows = [row | {"atom": -1} for own in whole.values() for row in own]
        for place, name in enumerate(slices):
            users = set() if growing is None else {s for s, a in growing.gate.stages.items() if name in a.adapters}
            touched = [data for data in self.data if growing is None or users & watcher.chosen.get(data.name, set())]
            for local in range(num_atoms):
                title = f"without atom {place * num_atoms + local + 1} of {len(slices) * num_atoms}"
                with tuner.without_atom(local, name):
                    left = whole | self._scored(touched, title)
                atom = first + place * num_atoms + local
                rows += [row | {"atom": atom} for own in left.values() for row in own]
        return rows

    def _scored(self, tasks: list[StageData], title: str, watcher: _Stages | None = None) -> Rows:
        if not tasks:
            return {}
        index = self.manifest.finished_stage
        self.progress.title, recorder = title, ScoreRecorder()
        recorder.start(self._keys(index), tasks)
        callbacks = [recorder, self.progress, self.module.strategy]
        if watcher is not None:
            callbacks.append(watcher)
            watcher.start(tasks)
        trainer = self.experiment.make_trainer(None, self.run_dir, callbacks)
        trainer.test(self.module, datamodule=AllTasks(tasks), verbose=False)
        rows = _rows_of(recorder, tasks, self.answers)
        self.answers = self.answers or {(a["task"], a["row"]): a["prediction"] for a in recorder.answers}
        return rows


class _Stages(L.Callback):
    """Notes the stages that a growing bank's gate sends each task's rows to."""

    def start(self, tasks: list[StageData]) -> None:
        self.tasks = tasks
        self.chosen: dict[str, set[str]] = {}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch's outcome."""
        self.chosen.setdefault(self.tasks[dataloader_idx].name, set()).update(outputs.stages or [])


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
