"""The loop over stages: train, score every task, write the rows, save the adapter, commit the manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from continual.callbacks.best_training import BestTraining
from continual.callbacks.general import GeneralRecorder
from continual.callbacks.gradients import GradientRecorder
from continual.callbacks.progress import ScoreTable, StageProgress, plan
from continual.callbacks.rewording import RewordingRecorder
from continual.callbacks.routing import RouteRecorder
from continual.callbacks.scores import ScoreRecorder
from continual.callbacks.theory import TheoryRecorder
from continual.callbacks.tokens import TokenRecorder
from continual.compat.lightning import on_device
from continual.config.experiment import Experiment
from continual.data.stage_data import StageData
from continual.errors import ConfigError, RunError, memory_named, one_line
from continual.interfaces import Recorder, Rows, StageContext
from continual.runtime import distributed
from continual.runtime.parameters import trainable
from continual.scoring.answer_cache import AnswerCache
from continual.scoring.shared_passes import scoring_data
from continual.storage import digests, manifest, records
from continual.storage.lock import DirectoryLock
from continual.storage.manifest import Manifest

_ROUTING_FACTS = ("num_atoms", "num_blocks", "top_k", "prior_weight")


class StageLoop:
    """One run: everything that a stage needs, ready to go on after the last stage that is finished.

    Args:
        experiment: The checked configuration.
        run_dir: The run's directory; made by ``prepare`` once nothing can be wrong with the configuration any more.

    Attributes:
        recorders: What is written down, in the order that Lightning calls them.
        scores: The one among them that scores tasks.
    """

    def __init__(self, experiment: Experiment, run_dir: Path) -> None:
        self.experiment, self.run_dir = experiment, run_dir
        self.module = experiment.model
        self.data: list[StageData] = []
        self.scores, self.progress = ScoreRecorder(), StageProgress()
        self.recorders: list[Recorder] = [self.scores, *_recorders(experiment)]
        self.lock = DirectoryLock(run_dir)

    def prepare(self, resumed: Manifest | None = None, accept_data: bool = False) -> None:
        """Load the backbone, read every task, and make the run directory or take up the one at hand.

        From then on no other process can take it up, until ``lock`` is released.

        Args:
            resumed: The manifest of the run to take up.
            accept_data: Take rows that are others than when the run began, and note that in the manifest.

        Raises:
            ConfigError, TaskError: Something is wrong; nothing has been written yet.
            RunError: What is on disk is not what the run wrote; nothing has been written yet.
        """
        experiment = self.experiment
        if resumed is not None and resumed.complete:  # whoever scores a finished run again does so alone
            experiment.trainer |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        trainer = experiment.make_trainer(None, self.run_dir, [])
        distributed.check(trainer)
        self.writes = trainer.is_global_zero
        if resumed is not None:
            if self.writes:
                self.lock.acquire()
            digests.check(self.run_dir, resumed)
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
        self._check_optimizer()
        if self.module.strategy.answering_parts(self.module) is not None:
            self.recorders.insert(0, AnswerCache())  # it hands cached answers to those behind it
        for recorder in self.recorders:
            recorder.check(self.module, self.data)
        if resumed is not None:
            self.manifest = resumed
            self._check_data(accept_data)
            self._take_up()
        self._join(trainer)
        if resumed is None:
            self.manifest = self._new_manifest(trainer)
            if self.writes:
                manifest.create(self.run_dir, experiment.resolved, self.manifest, self.lock)
        stages = list(zip(experiment.stages, self.data, strict=True))
        print(plan(experiment, stages, self.module.parameter_counts(), self.run_dir), flush=True)

    def _check_optimizer(self) -> None:
        """Make the optimizer once, so that what it refuses is told before anything is scored."""
        if not (parameters := trainable(self.module)):
            return  # the stage will say so, or its strategy gives it some
        try:
            self.module.make_optimizer(parameters)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise ConfigError(f"model.optimizer: {one_line(error)}") from error

    def run(self) -> None:
        """Run every stage that is not finished. Stage 0 scores the untrained model."""
        table = ScoreTable([data.name for data in self.data])
        for index in range(self.manifest.finished_stage + 1, len(self.data) + 1):
            started = time.monotonic()
            with memory_named(self._title(index)):
                self._work(index)
            self.manifest.stage_seconds[str(index)] = round(time.monotonic() - started, 1)
            self._note_sizes(index)
            self._commit(index)
            table.show(self._title(index), self.scores.headline())
        self.module.forget_recordings()
        self.lock.release()

    # -- one stage ----------------------------------------------------------------------------------------------------

    def _work(self, index: int) -> None:
        """Train stage ``index``, score after it and write what was found; stage 0 trains nothing."""
        skipped = bool(index) and self.module.strategy.skips(index, len(self.data))
        context = self.begin(index, [] if skipped else self.scored_after(index))
        tables: dict[str, Rows] = {}
        if not skipped:
            trainer = self._fit(index) if index else self._trainer(self.recorders)
            self._score(index, trainer, context.scored)
            self._release_trainer()
            for recorder in self.recorders:
                for table, rows in recorder.tables().items():
                    tables[table] = [*tables.get(table, []), *rows]
        if self.writes:
            self._write(index, tables)

    def begin(self, index: int, scored: Sequence[StageData]) -> StageContext:
        """Tell every recorder that stage ``index`` begins, after which ``scored`` are scored."""
        context = self.context(index, scored)
        for recorder in self.recorders:
            recorder.begin(context)
        return context

    def context(self, index: int, scored: Sequence[StageData]) -> StageContext:
        """Return what recorders are told of stage ``index``, after which ``scored`` are scored."""
        return StageContext(
            run=self.manifest.run,
            seed=self.experiment.seed,
            stage=index,
            name=self._title(index),
            module=self.module,
            stages=self.data,
            scored=scored,
            recorders=self.recorders,
            score=lambda tasks: self.score_tasks(index, tasks).found,
        )

    def _trainer(self, callbacks: Sequence[L.Callback]) -> L.Trainer:
        return self.experiment.make_trainer(None, self.run_dir, [*callbacks, self.progress])

    def _fit(self, index: int) -> L.Trainer:
        stage, data = self.experiment.stages[index - 1], self.data[index - 1]
        # A seed of its own for every stage: a resumed run needs no random state from before.
        L.seed_everything(self._seed(index), workers=True, verbose=False)
        self.progress.title = f"stage {index}/{len(self.data)} {stage.name}"
        self.module.strategy.start(self.module, data, index)
        # Recorders come before the strategy: they refuse a loss that is not finite before it ends the stage.
        callbacks = [*self.recorders, self.progress, self.module.strategy]
        trainer = self.experiment.make_trainer(stage, self.run_dir, callbacks)
        with on_device(self.module):
            trainer.fit(self.module, datamodule=data)
        if trainer.global_step == 0:
            raise RunError(f"stage {stage.name!r} trained no step: the trainer's limits leave none")
        self.manifest.trained_steps[str(index)] = trainer.global_step
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # at once: a trainer refers to itself, and waits for Python's collector
        return trainer

    def _score(self, index: int, trainer: L.Trainer, scored: Sequence[StageData]) -> None:
        if index == 0:
            self.progress.title = f"stage 0/{len(self.data)} untrained"
        started = time.monotonic()
        self._see_labels(index)
        self._test(trainer, scored)
        self.manifest.scoring_seconds[str(index)] = round(time.monotonic() - started, 1)

    def _test(self, trainer: L.Trainer, tasks: Sequence[StageData]) -> None:
        with on_device(self.module):
            trainer.test(self.module, datamodule=scoring_data(tasks), verbose=False)

    def _release_trainer(self) -> None:
        """Let the stage's trainer go, which Lightning leaves with the data it was given."""
        for data in self.data:
            data.trainer = None

    def score_tasks(self, index: int, tasks: Sequence[StageData]) -> ScoreRecorder:
        """Score tasks after stage ``index`` beside the stage's own scores, and leave those as they are."""
        recorder = ScoreRecorder()
        recorder.begin(self.context(index, tasks))
        trainer = self._trainer([recorder, self.module.strategy])
        self._test(trainer, tasks)
        return recorder

    def scored_after(self, index: int) -> list[StageData]:
        """Return what is scored after stage ``index``; everything before training and after the last stage."""
        if self.experiment.scoring == "all" or index in (0, len(self.data)):
            return self.data
        return self.data[:index] if self.experiment.scoring == "seen" else self.data[index - 1 : index]

    def score_reworded(self) -> dict[str, Rows]:
        """Return the rows of the tables wordings and wording_answers: a finished run's tasks under reworded prompts."""
        index = len(self.data)
        self._see_labels(index)
        self.progress.title = f"stage {index}/{index} under reworded prompts"
        recorder = next(recorder for recorder in self.recorders if isinstance(recorder, RewordingRecorder))
        recorder.begin(self.context(index, self.data))
        return recorder.tables()

    def _see_labels(self, index: int) -> None:
        """Tell all data which labels were seen up to stage ``index``."""
        seen = [label for data in self.data[:index] for label in data.task.labels or []]
        for data in self.data:
            data.seen_labels = seen

    # -- on disk ------------------------------------------------------------------------------------------------------

    def _write(self, index: int, tables: dict[str, Rows]) -> None:
        written = {
            table: records.append(self.run_dir, table, rows, self._schema(table))
            for table, rows in tables.items()
            if rows
        }
        folder = self._adapter_folder(index)
        folder.parent.mkdir(exist_ok=True)
        self.module.strategy.save_adapter(self.module, folder)
        if index:
            self.module.strategy.save(self._strategy_folder(index))
        files = [folder, self._strategy_folder(index)]
        for recorder in self.recorders:
            files += recorder.save(self.run_dir) or ()
        digests.note(self.run_dir, self.manifest, index, written, files)

    def _schema(self, table: str) -> Any:
        """Return a table's columns as one of the recorders declares them; None for those of the project itself."""
        return next((each.schemas[table] for each in self.recorders if table in each.schemas), None)

    def _note_sizes(self, index: int) -> None:
        strategy, note = self.module.strategy, self.manifest
        note.stored_bytes[str(index)] = strategy.stored_bytes()
        if (latency := self.scores.milliseconds_a_row()) is not None:
            note.milliseconds_a_row[str(index)] = round(latency, 4)
        if index:
            note.stored_parameters[str(index)] = strategy.stored_parameters(self.module)
            note.serving_parameters[str(index)] = strategy.serving_parameters(self.module)

    def _commit(self, index: int) -> None:
        self.manifest.finished_stage = index
        self.manifest.complete = index == len(self.data)
        if self.writes:
            self.manifest.commit(self.run_dir)
            # Only now: until the commit, resuming would start from what the stage before left.
            self._discard(index - 1)

    def _discard(self, index: int) -> None:
        """Remove what only resuming after stage ``index`` would read."""
        shutil.rmtree(self._strategy_folder(index), ignore_errors=True)
        for recorder in self.recorders:
            recorder.discard(self.run_dir, index)

    def _check_data(self, accept: bool) -> None:
        """Compare the rows of every task with those that the run began with.

        Raises:
            ConfigError: Some are others, and are not to be accepted.
        """
        state, found = self.manifest, {data.name: data.digests() for data in self.data}
        for name, splits in found.items() if state.data else ():
            for split, digest in splits.items():
                if state.data.get(name, {}).get(split, digest) == digest:
                    continue
                if not accept:
                    raise ConfigError(
                        f"stages.{name}: its {split} rows are not those that the run began with: restore them, or take "
                        "them as they are now with --accept-data"
                    )
                when = f"after stage {state.finished_stage} of {len(state.stages)}"
                state.accepted_data.append(f"The {split} rows of {name} were replaced {when}.")
        state.data = found

    def _take_up(self) -> None:
        """Load what the last finished stage left, and drop what an interrupted one did."""
        finished = self.manifest.finished_stage
        if finished >= 1:
            self.module.strategy.load(self.module, self._strategy_folder(finished))
        if finished >= 0:
            self.module.strategy.load_adapter(self.module, self._adapter_folder(finished))
            for recorder in self.recorders:
                recorder.restore(self.run_dir, finished)
        if self.writes:
            records.truncate(self.run_dir, finished)
            self._discard(finished - 1)  # a run that was killed between its commit and this has it still

    # -- what stands around it ----------------------------------------------------------------------------------------

    def _strategy_folder(self, index: int) -> Path:
        return self.run_dir / "strategy" / f"stage-{index:02d}"

    def _adapter_folder(self, index: int) -> Path:
        return self.run_dir / "adapters" / f"stage-{index:02d}"

    def _seed(self, index: int) -> int:
        return (self.experiment.seed * 1009 + index) % 2**32

    def _title(self, index: int) -> str:
        return self.data[index - 1].name if index else "(untrained)"

    def _join(self, trainer: L.Trainer) -> None:
        """Let the other processes come in, now that nothing can be wrong with the configuration any more."""
        distributed.join(trainer, self.module)
        # Its name may be the time at which each was started.
        self.run_dir = self.lock.directory = trainer.strategy.broadcast(self.run_dir)
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
            data={data.name: data.digests() for data in self.data},
            environment=manifest.environment(str(trainer.strategy.root_device), trainer.world_size),
        )


def _recorders(experiment: Experiment) -> list[Recorder]:
    """Return what the configuration asks to have recorded beside the scores."""
    return [
        RouteRecorder(),
        TokenRecorder(experiment.token_sample),
        *([GeneralRecorder()] if experiment.general_ability else []),
        GradientRecorder(),
        *([TheoryRecorder()] if experiment.theory else []),
        *([BestTraining()] if experiment.best_checkpoint else []),
        *([RewordingRecorder(experiment.wordings)] if experiment.wordings is not None else []),
        *experiment.recorders,
    ]


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Put the stage's name before the message of whatever is wrong with its task."""
    try:
        yield
    except ValueError as error:  # a ConfigError, a TaskError, or StageData refusing its arguments
        raise ConfigError(f"stages.{stage}: {error}") from error
