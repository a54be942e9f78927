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

from continual.callbacks import (
    BestTraining,
    GradientRecorder,
    RouteRecorder,
    ScoreRecorder,
    StageProgress,
    TheoryRecorder,
    TokenRecorder,
)
from continual.callbacks.general import GeneralRecorder
from continual.callbacks.progress import ScoreTable, plan
from continual.config.experiment import Experiment
from continual.data.stage_data import StageData
from continual.errors import ConfigError, RunError, memory_named
from continual.runtime import distributed
from continual.scoring.answer_cache import KnownAnswers
from continual.scoring.rewording import Slot, check_fit, score_slots
from continual.scoring.test_data import AllTasks
from continual.storage import manifest, records
from continual.storage.manifest import Manifest

_ROUTING_FACTS = ("num_atoms", "num_blocks", "top_k", "prior_weight")


class StageLoop:
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
        self.tokens = TokenRecorder(experiment.token_sample)
        self.known = KnownAnswers()
        self.gradients, self.progress = GradientRecorder(), StageProgress()
        self.general = GeneralRecorder() if experiment.general_ability else None
        self.best = BestTraining() if experiment.best_checkpoint else None
        self.theory = TheoryRecorder() if experiment.theory else None
        self.wordings: list[Slot] = []

    def prepare(self, resumed: Manifest | None = None) -> None:
        """Load the backbone, read every task, and make the run directory or take up the one at hand.

        Raises:
            ConfigError, TaskError: Something is wrong; nothing has been written yet.
        """
        experiment = self.experiment
        if resumed is not None and resumed.complete:  # whoever scores a finished run again does so alone
            experiment.trainer |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        trainer = experiment.make_trainer(None, self.run_dir, [])
        distributed.check(trainer)
        self.writes = trainer.is_global_zero
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
                distributed.check_rows(data.batch_size, len(data.scored_rows), trainer.world_size)
        distributed.check_module(self.module, trainer)
        self.module.strategy.check(self.module, self.data)
        self.module.strategy.prepare(self.module)
        if self.best is not None:
            self.best.check(self.module)
        if self.general is not None:
            self.general.prepare(self.module.backbone)
        if experiment.wordings is not None:
            has_gate = self.module.uses_instructions or self.module.strategy.reads_instructions
            self.wordings = experiment.wordings.slots(self.data, has_gate)
            check_fit(self.wordings, self.data)
        if resumed is not None:
            self.manifest = resumed
            self._take_up()
        self._join(trainer)
        if resumed is None:
            self.manifest = self._new_manifest(trainer)
            if self.writes:
                manifest.create(self.run_dir, experiment.resolved, self.manifest)
        stages = list(zip(experiment.stages, self.data, strict=True))
        print(plan(experiment, stages, self.module.parameter_counts(), self.run_dir), flush=True)

    def run(self) -> None:
        """Run every stage that is not finished. Stage 0 scores the untrained model."""
        table = ScoreTable([data.name for data in self.data])
        for index in range(self.manifest.finished_stage + 1, len(self.data) + 1):
            started = time.monotonic()
            with memory_named(self._title(index)):
                self._work(index)
            self.manifest.stage_seconds[str(index)] = round(time.monotonic() - started, 1)
            self._note_sizes(index)
            self.manifest.finished_stage = index
            self.manifest.complete = index == len(self.data)
            if self.writes:
                self.manifest.commit(self.run_dir)
                # Only now: until the commit, resuming would start from what the stage before left.
                shutil.rmtree(self._strategy_folder(index - 1), ignore_errors=True)
                self._known_answers(index - 1).unlink(missing_ok=True)
            table.show(self._title(index), self.scores.headline())
        self.module.forget_recordings()

    # -- one stage ----------------------------------------------------------------------------------------------------

    def _work(self, index: int) -> None:
        """Train stage ``index``, score after it and write what was found; stage 0 trains nothing."""
        if index and self.module.strategy.skips(index, len(self.data)):
            self._pass_over(index)
        else:
            self._score(index, self._fit(index) if index else self._trainer())
            self._let_go()
        self._write(index)

    def _trainer(self) -> L.Trainer:
        return self.experiment.make_trainer(None, self.run_dir, self._callbacks)

    def _fit(self, index: int) -> L.Trainer:
        stage, data = self.experiment.stages[index - 1], self.data[index - 1]
        # A seed of its own for every stage: a resumed run needs no random state from before.
        L.seed_everything(self._seed(index), workers=True, verbose=False)
        self.gradients.start(self._keys(index) | {"task": stage.name})
        self.progress.title = f"stage {index}/{len(self.data)} {stage.name}"
        self.module.strategy.start(self.module, data, index)
        callbacks = [*self._callbacks, self.gradients, self.module.strategy]
        if self.theory is not None:
            self.theory.start(self._keys(index) | {"task": stage.name})
            callbacks.append(self.theory)
        if self.best is not None:
            self.best.start(self._keys(index), data)
            callbacks.append(self.best)
        trainer = self.experiment.make_trainer(stage, self.run_dir, callbacks)
        with distributed.staying(self.module):
            trainer.fit(self.module, datamodule=data)
        if trainer.global_step == 0:
            raise RunError(f"stage {stage.name!r} trained no step: the trainer's limits leave none")
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # at once: a trainer refers to itself, and waits for Python's collector
        return trainer

    def _score(self, index: int, trainer: L.Trainer) -> None:
        if index == 0:
            self.progress.title = f"stage 0/{len(self.data)} untrained"
        started = time.monotonic()
        self._see_labels(index)
        trained = {data.name: stage for stage, data in enumerate(self.data, start=1)}
        scored = self.scored_after(index)
        self.tokens.start(self._keys(index), scored, trained)
        known = self.known.of(self.module, scored, needed=self.tokens.needed)
        self.scores.start(self._keys(index), scored, known.answers)
        self.routes.start(self._keys(index), scored, trained, known.routes)
        if self.general is not None:
            self.general.start(self._keys(index))
        if count := sum(map(len, known.rows.values())):
            total = sum(len(data.scored_rows) for data in scored)
            print(f"  {count:,} of {total:,} test rows are answered as before", flush=True)
        self._test(trainer, scored, known.rows)
        self.known.learn(self.module, self.scores, self.routes)
        self.manifest.scoring_seconds[str(index)] = round(time.monotonic() - started, 1)

    def _test(self, trainer: L.Trainer, tasks: list[StageData], known: dict[str, set[int]] | None = None) -> None:
        with distributed.staying(self.module):
            trainer.test(self.module, datamodule=AllTasks(tasks, known), verbose=False)

    def _let_go(self) -> None:
        """Let the stage's trainer go, which Lightning leaves with the data it was given."""
        for data in self.data:
            data.trainer = None

    def _score_best(self, index: int) -> list[dict[str, Any]]:
        """Return rows for the table scores: the stage's task under the epoch of best training accuracy."""
        best, data = self.best, self.data[index - 1]
        assert best is not None
        if best.is_last:
            return best.rows([row for row in self.scores.rows if row["task"] == data.name])
        with best.in_place(self.module):
            return best.rows(self._score_beside(index, [data]).rows)

    def _score_beside(self, index: int, tasks: list[StageData]) -> ScoreRecorder:
        """Score tasks after stage ``index`` beside the stage's own scores, and leave those as they are."""
        recorder = ScoreRecorder()
        recorder.start(self._keys(index), tasks)
        trainer = self.experiment.make_trainer(None, self.run_dir, [recorder, self.progress, self.module.strategy])
        self._test(trainer, tasks)
        return recorder

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
        self.tokens.start(keys, [], {})
        self.gradients.start(keys | {"task": self._title(index)})
        if self.theory is not None:
            self.theory.start(keys | {"task": self._title(index)})

    def _note_sizes(self, index: int) -> None:
        strategy, note = self.module.strategy, self.manifest
        note.stored_bytes[str(index)] = strategy.stored_bytes()
        if (latency := self.scores.milliseconds_a_row()) is not None:
            note.milliseconds_a_row[str(index)] = round(latency, 4)
        if index:
            note.stored_parameters[str(index)] = strategy.stored_parameters(self.module)
            note.serving_parameters[str(index)] = strategy.serving_parameters(self.module)

    def score_wordings(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of the tables wordings and wording_answers: the finished model's tasks in other words."""
        index = len(self.data)
        self._see_labels(index)
        self.progress.title = f"stage {index}/{index} in other words"
        return score_slots(self.wordings, self.data, lambda stages: self._score_beside(index, stages))

    def _see_labels(self, index: int) -> None:
        """Tell all data which labels were seen up to stage ``index``."""
        seen = [label for data in self.data[:index] for label in data.task.labels or []]
        keeps = self.module.strategy.answered_by(self.module) is not None  # else nobody asks what is to come
        later = [label for data in self.data[index:] for label in data.task.labels or []] if keeps else []
        for data in self.data:
            data.seen_labels, data.later_labels = seen, later

    def _write(self, index: int) -> None:
        tables = {"scores": self.scores.rows, "answers": self.scores.answers, **self.routes.tables}
        tables["tokens"] = self.tokens.rows
        if self.general is not None:
            tables["general"] = self.general.rows
        if index == len(self.data):
            tables |= self.score_wordings()
        if index:
            tables["gradients"] = self.gradients.rows
            if self.theory is not None:
                tables["theory"] = self.theory.rows
            if self.best is not None and not self.module.strategy.skips(index, len(self.data)):
                tables["scores"] = [*tables["scores"], *self._score_best(index)]
        if self.writes:
            self._put_on_disk(index, tables)
        self.routes.tables = {}  # the largest, with each atom of each block: nobody asks for it again

    def _put_on_disk(self, index: int, tables: dict[str, list[dict[str, Any]]]) -> None:
        for table, rows in tables.items():
            if rows:
                records.append(self.run_dir, table, rows)
        folder = self.run_dir / "adapters" / f"stage-{index:02d}"
        folder.parent.mkdir(exist_ok=True)
        self.module.strategy.save_adapter(self.module, folder)
        if index:
            self.module.strategy.save(self._strategy_folder(index))
        if index < len(self.data):
            self.known.write(self._known_answers(index))

    # -- what stands around it ----------------------------------------------------------------------------------------

    @property
    def _callbacks(self) -> list[L.Callback]:
        general = [] if self.general is None else [self.general]
        return [self.scores, self.routes, self.tokens, *general, self.progress]

    def _strategy_folder(self, index: int) -> Path:
        return self.run_dir / "strategy" / f"stage-{index:02d}"

    def _known_answers(self, index: int) -> Path:
        return self.run_dir / f"known-answers-{index:02d}.parquet"

    def _seed(self, index: int) -> int:
        return (self.experiment.seed * 1009 + index) % 2**32

    def _keys(self, index: int) -> dict[str, Any]:
        return {"run": self.manifest.run, "seed": self.experiment.seed, "stage": index}

    def _title(self, index: int) -> str:
        return self.data[index - 1].name if index else "(untrained)"

    def _join(self, trainer: L.Trainer) -> None:
        """Let the other processes come in, now that nothing can be wrong with the configuration any more."""
        distributed.join(trainer, self.module)
        self.run_dir = trainer.strategy.broadcast(self.run_dir)  # its name may be the time at which each was started
        if self.experiment.threads is not None:  # Lightning divides a machine's cores among its processes
            torch.set_num_threads(self.experiment.threads)

    def _new_manifest(self, trainer: L.Trainer) -> Manifest:
        experiment, module = self.experiment, self.module
        adapter, strategy = module.adapter, module.strategy
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
                **{name: getattr(adapter, name, None) for name in ("r", *_ROUTING_FACTS)},
                "accounting": accounting() if (accounting := getattr(module.tuner, "accounting", None)) else None,
            },
            bounds=experiment.bounds,
            environment=manifest.environment(str(trainer.strategy.root_device), trainer.world_size),
        )

    def _take_up(self) -> None:
        """Drop what an interrupted stage left behind and load the last finished adapter and usages."""
        finished = self.manifest.finished_stage
        if self.writes:
            records.truncate(self.run_dir, finished)
        if finished >= 1:
            self.module.strategy.load(self.module, self._strategy_folder(finished))
        if finished >= 0:
            self.module.strategy.load_adapter(self.module, self.run_dir / "adapters" / f"stage-{finished:02d}")
            self.known.read(self._known_answers(finished))
            routing = records.read(self.run_dir, "routing")
            self.routes.restore(routing.query("stage <= @finished"))


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Put the stage's name before the message of whatever is wrong with its task."""
    try:
        yield
    except ValueError as error:  # a ConfigError, a TaskError, or StageData refusing its arguments
        raise ConfigError(f"stages.{stage}: {error}") from error
