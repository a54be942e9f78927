"""What a step is spared: nothing that somebody reads, and no tensor."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from contexts import context

from continual.callbacks import GradientRecorder, StageProgress
from continual.scoring.data_module import ScoringDataModule


class Watch(L.Callback):
    """Reads what was logged, as a person's own callback may."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the logged loss and the step's own."""
        self.losses.append((float(trainer.callback_metrics["loss"]), outputs["loss"].item()))


def test_the_loss_is_logged_where_somebody_beside_us_may_read_it(make_module, make_data, make_trainer) -> None:
    module = make_module()
    data = make_data(module, num_rows=8, batch_size=4)
    watch, recorder = Watch(), GradientRecorder()
    recorder.begin(context(1))
    make_trainer(watch, recorder, max_epochs=1).fit(module, datamodule=data)
    assert len(watch.losses) == 2 and all(logged == own for logged, own in watch.losses)
    assert [row["value"] for row in recorder.rows if row["metric"] == "train_loss"] == [own for _, own in watch.losses]

    recorder.begin(context(2))
    trainer = make_trainer(recorder, StageProgress(), max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert "loss" not in trainer.callback_metrics
    assert len([row for row in recorder.rows if row["metric"] == "train_loss"]) == 2

    bar = make_trainer(max_epochs=1, enable_progress_bar=True)
    bar.fit(module, datamodule=data)
    assert "loss" in bar.progress_bar_metrics


@pytest.mark.parametrize(("backbone", "kind"), [("causal_lm", "labels"), ("causal_lm", "free"), ("mlp", "regression")])
def test_every_tensor_of_a_batch_moves_and_its_rows_stay(make_module, make_data, backbone: str, kind: Any) -> None:
    module = make_module(backbone)
    data = make_data(module, kind)
    for owner, loader in ((data, data.train_dataloader()), (ScoringDataModule([data]), data.test_dataloader())):
        batch = next(iter(loader))
        moved = owner.transfer_batch_to_device(batch, torch.device("meta"), 0)
        assert moved.keys() == batch.keys()
        assert moved["rows"] is batch["rows"] and moved["instructions"] is batch["instructions"]
        tensors = [*moved["forward"].values(), *([moved["labels"]] if "labels" in moved else [])]
        if "label_tree" in moved:
            tensors += [value for value in vars(moved["label_tree"]).values() if isinstance(value, torch.Tensor)]
        assert tensors and all(tensor.is_meta for tensor in tensors)
