"""Recorded training passes: what the plain ones give, whatever differs between batches, and nothing a GPU waits for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from peft import PeftModel
from recording import NoWaiting, Recorded, Recorder, capturing
from spreading import spread
from torch import Tensor

from continual.data.batch import IGNORED
from continual.data.stage_data import StageData
from continual.errors import RunError
from continual.strategies import GrowingBank
from continual.strategies.bank_parts import FIRST
from continual.training import cuda_graphs
from continual.training.compiled import compile_layers
from continual.training.cuda_graphs import GraphedPasses
from continual.training.module import ContinualModule

BANK = {"GrowingBank": {"background_rows": 0}}


def gradients(module: ContinualModule, loss: Tensor) -> list[Tensor | None]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True))


def agree_and_step(
    module: ContinualModule, passes: GraphedPasses, batch: dict[str, Any], rtol: float, atol: float
) -> tuple[Tensor | None, Tensor | None]:
    """Hold a batch's loss and gradients to the plain ones, then step; returns the plain outputs and those found."""
    loss, outputs = module.training_pass(batch)
    expected = gradients(module, loss)
    loss, outputs = loss.detach(), outputs if outputs is None else outputs.detach()  # no graph beside a recording
    replayed, found = passes(batch)
    torch.testing.assert_close(replayed, loss)
    for mine, plain in zip(gradients(module, replayed), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=rtol, atol=atol)
    with torch.no_grad():  # as an optimizer does: in place
        for parameter, gradient in zip((p for p in module.parameters() if p.requires_grad), expected, strict=True):
            if gradient is not None:
                parameter.sub_(gradient, alpha=0.05)
    return outputs, found


def batches(data: StageData, sizes: list[int], packing: bool = False) -> list[dict[str, Any]]:
    starts, collate = (
        [sum(sizes[:index]) for index in range(len(sizes))],
        data._packed_collator() if packing else data._collator(True),
    )
    return [collate(data.train_rows[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


@pytest.mark.parametrize("adapter", ["lora", "queryable", "experts", "regressor", "packed"])
@pytest.mark.parametrize("strategy", ["Sequential", "LwF"])
def test_a_recording_gives_the_plain_losses_and_gradients(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]], adapter: str, strategy: str
) -> None:
    packing = adapter == "packed"
    module, (data, *_) = prepared(strategy, "queryable" if packing else adapter, rows=24)
    spread(module, 0.1)
    recorder = Recorder()
    passes = GraphedPasses(module, recorder)
    for step, batch in enumerate(batches(data, [4] * 6, packing)):
        outputs, found = agree_and_step(module, passes, batch, rtol=1e-4, atol=1e-6)
        assert (found is None) == (outputs is None) == (strategy == "Sequential")
        if outputs is not None:
            torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-5)
        assert len(recorder.shapes) == (step >= 2)  # the third of a shape is recorded, and the only one


def test_each_shape_has_a_recording_of_its_own(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_SIGHTINGS", 1)
    module, (data, *_) = prepared("Sequential", "queryable", rows=24)
    recorder = Recorder()
    passes = GraphedPasses(module, recorder)
    for batch in batches(data, [4, 3, 4, 3, 2]):
        passes(batch)
    assert [shapes[0][0] for shapes in recorder.shapes] == [4, 3, 2]


@pytest.mark.parametrize("length", [5, 63, 64, 65, 140])
def test_padding_leaves_what_is_asked_for_in_place(length: int) -> None:
    columns = min(length - 1, 7)
    ids, labels = torch.arange(2 * length).view(2, length), torch.arange(2 * columns).view(2, columns)
    padded, first = cuda_graphs._padded({"forward": {"input_ids": ids}, "labels": labels})
    wide, kept = padded["forward"]["input_ids"], padded["labels"]
    assert wide.shape[1] % 64 == 0 and torch.equal(wide[:, :length], ids)
    assert torch.equal(kept[:, first : first + columns], labels)
    assert (kept != IGNORED).sum() == labels.numel()
    assert kept.shape[1] < wide.shape[1]  # a token is predicted from one before it
    # Counted from the right, each label stands below its token.
    assert wide.shape[1] - kept.shape[1] + first == length - columns


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "queryable", "experts"])
def test_nothing_in_a_pass_waits_for_the_device(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]], adapter: str, packing: bool
) -> None:
    module, (data, *_) = prepared("Sequential", adapter, rows=8)
    spread(module, 0.1)
    padded, _ = cuda_graphs._padded(batches(data, [4], packing)[0])
    module.train()
    module.training_pass(padded)  # what is made once, on the first pass, is made outside of a recording too
    with capturing(), NoWaiting():
        loss, _ = module.training_pass(padded)
        assert any(gradient is not None for gradient in gradients(module, loss))


@pytest.mark.parametrize("strategy", ["Sequential", "GrowingBank"])
@pytest.mark.parametrize("adapter", ["lora", "queryable", "experts", "regressor"])
@pytest.mark.usefixtures("only_what_is_new")
def test_a_pass_leaves_no_graph_behind(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]], adapter: str, strategy: str
) -> None:
    """One that waits for Python's collector of cycles keeps its activations, and its stream in a recording's way."""
    if strategy == "GrowingBank" and adapter != "queryable":
        pytest.skip("it grows our own bank alone")
    module, (data, *_) = prepared(strategy, adapter, rows=8, **BANK.get(strategy, {}))
    if strategy == "GrowingBank":
        module.strategy.start(module, data, 1)
        module.strategy.on_train_start(Trainer(logger=False, accelerator="cpu"), module)
    batch = data.collate(data.train_rows[:4])
    module.train()

    def graphs() -> int:
        return sum(isinstance(found, Tensor) and found.grad_fn is not None for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = graphs()
        loss, _ = module.training_pass(batch)
        assert graphs() > before
        loss.backward()
        del loss
        assert graphs() == before
    finally:
        gc.enable()


def test_a_growing_bank_is_recorded_too(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_SIGHTINGS", 1)
    module, (data, *_) = prepared("GrowingBank", "queryable", rows=16, background_rows=0)
    module.strategy.start(module, data, 1)
    module.strategy.on_train_start(Trainer(logger=False, accelerator="cpu"), module)
    spread(module, 0.1)
    passes = GraphedPasses(module, Recorder())
    for batch in batches(data, [4, 4, 4]):
        loss, _ = module.training_pass(batch)
        torch.testing.assert_close(passes(batch)[0], loss)
    padded, _ = cuda_graphs._padded(batch)
    with capturing(), NoWaiting():
        gradients(module, module.training_pass(padded)[0])


@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_has_the_same_mask_recorded_or_not(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]], packing: bool
) -> None:
    """Compiled layers would else be compiled anew while they are recorded, which a GPU forbids."""
    module, (data, *_) = prepared("Sequential", "queryable", rows=8)
    (batch,) = batches(data, [4], packing)
    masks: list[Tensor | None] = []
    first_layer = cast(Any, module.model).get_base_model().get_decoder().layers[0]
    first_layer.register_forward_pre_hook(
        lambda layer, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for context in (nullcontext(), capturing()):
        with context, nullcontext() if packing else NoWaiting():
            module.training_pass(cuda_graphs._padded(batch)[0])
    assert [mask is not None for mask in masks] == [packing, packing]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("strategy", ["Sequential", "LwF", "GrowingBank"])
@pytest.mark.parametrize("adapter", ["lora", "queryable", "experts", "regressor", "packed", "compiled"])
def test_a_cuda_graph_gives_the_plain_losses_and_gradients(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]],
    monkeypatch: pytest.MonkeyPatch,
    adapter: str,
    strategy: str,
) -> None:
    if strategy == "GrowingBank" and adapter not in ("queryable", "packed", "compiled"):
        pytest.skip("it grows our own bank alone")
    monkeypatch.setattr(cuda_graphs, "_SIGHTINGS", 2)
    packing, compiles = adapter == "packed", adapter == "compiled"
    adapter = "queryable" if packing or compiles else adapter
    module, (data, *_) = prepared(strategy, adapter, rows=64, **BANK.get(strategy, {}))
    module.cuda()
    if compiles:
        compile_layers(cast(PeftModel, module.model))
    if strategy == "GrowingBank":
        module.strategy.start(module, data, 1)
        module.strategy.on_train_start(Trainer(logger=False, accelerator="gpu", devices=1), module)
    spread(module, 0.1)
    passes = GraphedPasses(module)
    for batch in batches(data, [4, 3, 4, 3, 4, 3, 3, 4, 4, 3], packing):  # two shapes in turn share their memory
        agree_and_step(module, passes, move_data_to_device(batch, module.device), rtol=1e-3, atol=1e-5)
    assert len(passes._passes) == 2


LORA, BANK_ALONE = {"adapter": "lora"}, {"background_rows": 0, "reuse": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "Sequential": {}, "EWC": {}, "LwF": {}, "AGEM": LORA, "ExperienceReplay": {}, "CLoRA": LORA, "SEQR": LORA,
    "OLoRA": LORA, "NLoRA": LORA, "PerTask": {}, "Joint": {}, "ReuseBank": {"source_stages": 1},
    "GrowingBank": BANK_ALONE, "GrowingBank copying": BANK_ALONE | {"reuse": "copy", "prune_tolerance": 0.0},
    "GrowingBank reading": BANK_ALONE | {"reuse": "read"},
    "GrowingBank sharing": BANK_ALONE | {"reuse": "copy", "prune_slack": 9.0},
}  # fmt: skip
KEPT = {"Sequential", "EWC", "LwF", "AGEM", "ExperienceReplay", "CLoRA", "SEQR"}
KEPT |= {"GrowingBank", "GrowingBank copying", "GrowingBank sharing"}
"""Where the passes of all stages read and train the same tensors."""


@pytest.mark.parametrize("method", METHODS)
def test_recordings_of_earlier_stages_serve_where_they_hold(
    sequence: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    arguments = {"adapter": "queryable", "num_stages": 3, "rows": 24} | METHODS[method]
    monkeypatch.setattr(cuda_graphs, "_SIGHTINGS", 1)
    if "reuse" in arguments and arguments["reuse"] != "none":  # whatever the earlier stages are good for
        monkeypatch.setattr(GrowingBank, "_like_stage", lambda self, module: [FIRST] if self.stage > 1 else [])

    def found(run: str) -> tuple[list[float], list[Tensor]]:
        made = sequence(method.partition(" ")[0], run=run, **arguments)
        made.run()
        return [row["value"] for row in made.scores.rows], [p.detach() for p in made.module.parameters()]

    (scores, parameters), recorders = found("plain"), list[Recorder]()
    monkeypatch.setattr(ContinualModule, "_records", True)
    monkeypatch.setattr(cuda_graphs, "_on_cuda", lambda: recorders.append(Recorder()) or recorders[-1])
    replayed, mine = found("recorded")
    assert replayed == pytest.approx(scores, abs=1e-5)
    for tensor, expected in zip(mine, parameters, strict=True):  # rounding grows; a stage moves numbers by 0.1
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0.01)
    assert recorders and all(len(recorder.shapes) == len(set(recorder.shapes)) for recorder in recorders)
    assert (len(recorders) == 1) == (method in KEPT)


def test_a_pass_that_cannot_be_recorded_is_one_line(
    prepared: Callable[..., tuple[ContinualModule, list[StageData]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Recorded:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA")

    monkeypatch.setattr(cuda_graphs, "_SIGHTINGS", 1)
    module, (data, *_) = prepared("Sequential", "lora", rows=8)
    message = r"^model\.cuda_graphs cannot record .* \(CUDA error: .* capturing\): set it to false$"
    with pytest.raises(RunError, match=message):
        GraphedPasses(module, refuse)(data.collate(data.train_rows[:4]))


@pytest.mark.parametrize(
    ("fields", "records"),
    [
        ({}, False),
        ({"compile": True}, True),
        ({"compile": True, "gradient_checkpointing": True}, False),
        ({"compile": True, "cuda_graphs": False}, False),
        ({"cuda_graphs": True}, True),
    ],
)
def test_compiled_passes_are_recorded_unless_told_otherwise(fields: dict[str, bool], records: bool) -> None:
    module = ContinualModule(None, None, **fields)  # type: ignore[arg-type]
    assert module.cuda_graphs == records


def test_recomputed_activations_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match=r"^model\.cuda_graphs cannot record"):
        ContinualModule(None, None, cuda_graphs=True, gradient_checkpointing=True)  # type: ignore[arg-type]
