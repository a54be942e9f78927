"""Step seconds: how long each training step took."""

import time

from continual.callbacks import Recorder


class StepSeconds(Recorder):
    def begin(self, context):  # a stage begins; stage 0 trains nothing and is scored alone
        self.context, self.rows = context, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):  # Lightning's own hooks
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        seconds = time.perf_counter() - self.started
        measured = {"metric": "step_seconds", "direction": "lower", "value": seconds, "count": len(batch["rows"])}
        self.rows.append(self.context.keys | {"step": trainer.global_step} | measured)

    def tables(self):  # the stage is trained and scored: rows for each table, by its name
        return {"step_seconds": self.rows}
