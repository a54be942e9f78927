"""Step seconds: how long each training step took."""

import time

from continual.callbacks import Recorder


class StepSeconds(Recorder):
    def begin(self, context):  # a stage begins; context.keys are the columns run, seed, stage and task
        self.keys, self.rows = context.keys, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # Lightning's own hooks
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seconds = time.perf_counter() - self.started
        place = {"step": trainer.global_step, "metric": "step_seconds", "direction": "lower"}
        self.rows.append(self.keys | place | {"value": seconds, "count": len(batch["rows"])})

    def tables(self):  # the stage is over: rows for each table, by its name
        return {"step_seconds": self.rows}
