"""The loop over stages: fit, score every task, write the rows, save the adapter, commit the manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from continual import manifest, records
from continual.callbacks import GradientRecorder, RouteRecorder, ScoreRecorder, StageProgress
from continual.callbacks.progress import ScoreTable, plan
from continual.errors import ConfigError, RunError
from continual.experiment import Experiment
from continual.manifest import Manifest
from continual.stage_data import StageData


class AllTasks(L.LightningDataModule):
    """The test rows of every stage, one loader each."""

    def __init__(self, stages: list[StageData]) -> None:
        super().__init__()
        self.stages = stages

    def test_dataloader(self) -> list[Any]:
        """Return a loader for each task, in training order."""
        return [data.test_dataloader() for data in self.stages]


class Sequence:
    """One run: everything that a stage needs, ready to go on after the last stage that is finished.

    Args:
        experiment: The checked configuration.
        run_dir: The run's directory; made by ``prepare`` once nothing can be wrong with the configuration any more.
    """

    def __init__(self, experiment: Experiment, run_dir: Path) -> None:
        self.experiment, self.run_dir = experiment, run_dir
        self.module = experiment.model
        self.data: list[StageData] = []
        self.scores, self.routes = ScoreRecorder(), RouteRecorder()
        self.gradients, self.progress = GradientRecorder(), StageProgress()

    def prepare(self, resumed: Manifest | None = None) -> None:
        """Load the backbone, read every task, and make the run directory or take up the one at hand.

        Raises:
            ConfigError, TaskError: Something is wrong; nothing has been written yet.
        """
        experiment = self.experiment
        if experiment.threads is not None:
            torch.set_num_threads(experiment.threads)
        L.seed_everything(experiment.seed, workers=True, verbose=False)
        for index, stage in enumerate(experiment.stages, start=1):
            with _named(stage.name):
                stage.task.prepare()
                data = StageData(stage.task, seed=self._seed(index), **experiment.data)
            data.name, data.index = stage.name, index - 1
            self.data.append(data)
        self.module.configure_model()
        for data in self.data:
            with _named(data.name):
                data.prepare(self.module)
        self.module.strategy.check(self.module, self.data)
        self.module.strategy.prepare(self.module)
        if resumed is None:
            self.manifest = self._new_manifest()
            manifest.create(self.run_dir, experiment.resolved, self.manifest)
        else:
            self.manifest = resumed
            self._take_up()
        stages = list(zip(experiment.stages, self.data, strict=True))
        print(plan(experiment, stages, self.module.parameter_counts(), self.run_dir), flush=True)

    def run(self) -> None:
        """Run every stage that is not finished. Stage 0 scores the untrained model."""
        table = ScoreTable([data.name for data in self.data])
        for index in range(self.manifest.finished_stage + 1, len(self.data) + 1):
            started = time.monotonic()
            if index and self.module.strategy.skips(index, len(self.data)):
                self._pass_over(index)
            else:
                trainer = (
                    self._fit(index) if index else self.experiment.make_trainer(None, self.run_dir, self._callbacks)
                )
                self._score(index, trainer)
            self._write(index)
            self.manifest.stage_seconds[str(index)] = round(time.monotonic() - started, 1)
            self._note_sizes(index)
            self.manifest.finished_stage = index
            self.manifest.complete = index == len(self.data)
            self.manifest.commit(self.run_dir)
            # Only now: until the commit, resuming would start from what the stage before left.
            shutil.rmtree(self._strategy_folder(index - 1), ignore_errors=True)
            table.show(self._title(index), self.scores.headline())

    # -- one stage ----------------------------------------------------------------------------------------------------

    def _fit(self, index: int) -> L.Trainer:
        stage, data = self.experiment.stages[index - 1], self.data[index - 1]
        # A seed of its own for every stage: a resumed run needs no random state from before.
        L.seed_everything(self._seed(index), workers=True, verbose=False)
        self.gradients.start(self._keys(index) | {"task": stage.name})
        self.progress.title = f"stage {index}/{len(self.data)} {stage.name}"
        self.module.strategy.start(self.module, data, index)
        callbacks = [*self._callbacks, self.gradients, self.module.strategy]
        trainer = self.experiment.make_trainer(stage, self.run_dir, callbacks)
        trainer.fit(self.module, datamodule=data)
        if trainer.global_step == 0:
            raise RunError(f"stage {stage.name!r} trained no step: the trainer's limits leave none")
        return trainer

    def _score(self, index: int, trainer: L.Trainer) -> None:
        if index == 0:
            self.progress.title = f"stage 0/{len(self.data)} untrained"
        seen = [label for data in self.data[:index] for label in data.task.labels or []]
        for data in self.data:
            data.seen_labels = seen
        trained = {data.name: stage for stage, data in enumerate(self.data, start=1)}
        scored = self.scored_after(index)
        self.scores.start(self._keys(index), scored)
        self.routes.start(self._keys(index), scored, trained)
        trainer.test(self.module, datamodule=AllTasks(scored), verbose=False)

    def scored_after(self, index: int) -> list[StageData]:
        """Return what is scored after stage ``index``; everything before training and after the last stage."""
        if self.experiment.scoring == "all" or index in (0, len(self.data)):
            return self.data
        return self.data[:index] if self.experiment.scoring == "seen" else self.data[index - 1 : index]

    def _pass_over(self, index: int) -> None:
        """Let a stage leave no rows."""
        keys = self._keys(index)
        self.scores.start(keys, [])
        self.routes.start(keys, [], {})
        self.gradients.start(keys | {"task": self._title(index)})

    def _note_sizes(self, index: int) -> None:
        strategy, note = self.module.strategy, self.manifest
        note.stored_bytes[str(index)] = strategy.stored_bytes()
        if index:
            note.stored_parameters[str(index)] = strategy.stored_parameters(self.module)
            note.serving_parameters[str(index)] = strategy.serving_parameters(self.module)

    def _write(self, index: int) -> None:
        tables = {"scores": self.scores.rows, "answers": self.scores.answers, **self.routes.tables}
        if index:
            tables["gradients"] = self.gradients.rows
        for table, rows in tables.items():
            if rows:
                records.append(self.run_dir, table, rows)
        folder = self.run_dir / "adapters" / f"stage-{index:02d}"
        folder.parent.mkdir(exist_ok=True)
        self.module.save_adapter(folder)
        if index:
            self.module.strategy.save(self._strategy_folder(index))

    # -- what stands around it ----------------------------------------------------------------------------------------

    @property
    def _callbacks(self) -> list[L.Callback]:
        return [self.scores, self.routes, self.progress]

    def _strategy_folder(self, index: int) -> Path:
        return self.run_dir / "strategy" / f"stage-{index:02d}"

    def _seed(self, index: int) -> int:
        return (self.experiment.seed * 1009 + index) % 2**32

    def _keys(self, index: int) -> dict[str, Any]:
        return {"run": self.manifest.run, "seed": self.experiment.seed, "stage": index}

    def _title(self, index: int) -> str:
        return self.data[index - 1].name if index else "(untrained)"

    def _new_manifest(self) -> Manifest:
        experiment, module = self.experiment, self.module
        adapter, strategy = module.adapter, module.strategy
        trainer = experiment.make_trainer(None, self.run_dir, [])
        return Manifest(
            run=experiment.name,
            seed=experiment.seed,
            config_sha256=manifest.sha256(experiment.resolved),
            stages=[data.name for data in self.data],
            tasks={data.name: data.facts() for data in self.data},
            model={
                "backbone": module.backbone.name,
                "adapter": f"{type(adapter).__module__}.{type(adapter).__qualname__}",
                "strategy": type(strategy).__name__,
                "keeps_training_rows": strategy.needs_rows,
                **module.parameter_counts(),
                **{name: getattr(adapter, name, None) for name in ("num_atoms", "num_blocks", "top_k", "prior_weight")},
            },
            bounds=experiment.bounds,
            environment=manifest.environment(str(trainer.strategy.root_device)),
        )

    def _take_up(self) -> None:
        """Drop what an interrupted stage left behind and load the last finished adapter and usages."""
        finished = self.manifest.finished_stage
        records.truncate(self.run_dir, finished)
        if finished >= 1:
            self.module.strategy.load(self.module, self._strategy_folder(finished))
        if finished >= 0:
            self.module.load_adapter(self.run_dir / "adapters" / f"stage-{finished:02d}")
            self.routes.restore(records.read(self.run_dir, "routing"))


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Put the stage's name before the message of whatever is wrong with its task."""
    try:
        yield
    except ValueError as error:  # a ConfigError, a TaskError, or StageData refusing its arguments
        raise ConfigError(f"stages.{stage}: {error}") from error
