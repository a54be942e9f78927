"""The Instruction-Queryable adapter as a PEFT tuner: puts adapted layers, bank and routing into any model.

Queryable LoRA (arXiv 2605.08423): every adapted projection l has its own A_l (r x d_in) and B_l (d_out x r); all of
them share one bank of atoms, mixed for each token by a router that a block of layers shares (``router``):

    y_l = W_l h_l + (lora_alpha / r) B_l S_b A_l h_l

Importing this module registers the method with PEFT, so that ``get_peft_model``, ``save_pretrained``,
``PeftModel.from_pretrained`` and ``generate`` know it. Calls take two more keywords: ``instruction_ids`` (B, L), token
ids of each row's instruction, negative where padded; or ``instruction_encoding`` (B, E). Neither is required. Where a
training pass has its rows packed into one, ``row_of_token`` (1, T) says whose instruction each token goes by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from continual.adapters.config import PEFT_NAME, QueryableLoraConfig
from continual.adapters.queryable.carrier import (
    ROW_KEYWORDS,
    RouteCarrier,
    carriers_of,
    patch_generate,
    refuse_inexact_checkpointing,
)
from continual.adapters.queryable.layer import QueryableLinear
from continual.adapters.queryable.router import AtomBank, RoutingState
from continual.adapters.queryable.row_slices import RowRouting, States, routes_of
from continual.adapters.routed_linear import layer_of
from continual.adapters.tuner import RoutedTuner


class QueryableLoraModel(RoutedTuner):
    """The tuner behind ``get_peft_model(model, QueryableLoraConfig(...))``; reach it as ``peft_model.base_model``.

    Layers are ordered as the model registers them and cut into ``num_blocks`` consecutive blocks of nearly equal
    length. A fresh routing state is made for every forward pass and handed down as a keyword of the decoder layers, so
    that gradients stay exact under non-reentrant activation checkpointing; a model whose layers take no keywords gets
    the state on its layers directly and cannot be checkpointed.
    """

    uses_shared_state = True
    prefix = "queryable_"
    tuner_layer_cls = QueryableLinear
    _removed: tuple[str, int] | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Create the bank of ``adapter_name`` and its layers.

        Raises:
            ValueError: A target module matches nothing, even if others match; or num_blocks exceeds the layers.
        """
        if "queryable_bank" not in dict(self.named_children()):
            self.queryable_bank = nn.ModuleDict()
        config = cast(QueryableLoraConfig, self.peft_config[adapter_name])
        bank = AtomBank(config, self._instruction_dim(model, config))
        self.queryable_bank[adapter_name] = bank
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            del self.queryable_bank[adapter_name]
            raise
        if not bank.atoms.is_meta:  # low_cpu_mem_usage: the loaded tensors take the place of empty ones
            bank.to(next(self._layers(adapter_name)).base_weight.device)
        self._freeze_banks_like_layers()

    # -- PEFT's hooks -------------------------------------------------------------------------------------------------

    def _update_layer(self, layer: Any, adapter_name: str, config: Any, place: str) -> None:
        layer.update_layer(adapter_name, config, self._bank(adapter_name), place)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make ``adapter_name`` the active adapter(s), the only ones with gradients."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._freeze_banks_like_layers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch the gradients of the named adapters, their banks included."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_banks_like_layers()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._freeze_banks_like_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its bank; PEFT makes another one active (and trainable) if this one was."""
        super().delete_adapter(adapter_name)
        del self.queryable_bank[adapter_name]
        self._freeze_banks_like_layers()

    def _freeze_banks_like_layers(self) -> None:
        # PEFT switches (and, when an adapter is added, restores) the gradients of what lies in the layers only.
        for name, bank in self.queryable_bank.items():
            bank.requires_grad_(any(layer.trains(name) for layer in self._layers(name)))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self._bank(adapter_name).to(next(self._layers(adapter_name)).queryable_A[adapter_name].dtype)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        vars(self.model).pop("prepare_inputs_for_generation", None)
        return unloaded

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def _install_hooks(self, model: nn.Module) -> None:
        super()._install_hooks(model)
        self._under_way: States = {}
        carriers = carriers_of(model, self._adapted)
        carried = {id(layer) for carrier in carriers for layer in carrier.layers}
        self._uncarried = RouteCarrier([layer for layer in self._adapted if id(layer) not in carried])
        self._has_carriers = bool(carriers)
        self._checkpointable = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._hooks += [handle for carrier in carriers for handle in carrier.hook()]
        patch_generate(model)

    def _begin_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        refuse_inexact_checkpointing(model, self._checkpointable, self._has_carriers)
        ids, encoding = kwargs.pop("instruction_ids", None), kwargs.pop("instruction_encoding", None)
        if ids is not None:
            encoding = self.encode_instruction(ids)
        rows = {name: kwargs.pop(name, None) for name in ROW_KEYWORDS}
        row_of_token, growing = kwargs.pop("row_of_token", None), self.growing
        if row_of_token is not None and growing is not None and growing.in_use is None:
            raise ValueError("a gate cannot choose slices for rows that are packed into one: leave them apart")
        uses = dict.fromkeys(self.active_adapters) if growing is None else growing.uses(rows)
        states: dict[str, RoutingState | RowRouting] = {}
        for name, slices in uses.items():
            if slices is None:
                states[name] = self._begin(name, encoding, row_of_token)
            else:
                own = {s: self._begin(s, encoding if encoding is None else encoding[r]) for s, r in slices.rows.items()}
                states[name] = RowRouting(slices, own, [self._bank(adapter) for adapter in own])
        if self._has_carriers:
            kwargs["routing_state"] = states
        self._uncarried.give(states)
        self._under_way = states
        return args, kwargs

    def _begin(self, name: str, encoding_BE: Tensor | None, row_of_token: Tensor | None = None) -> RoutingState:
        """Start an adapter's state of the pass, for the rows whose instructions these are."""
        bank = self._bank(name)
        centred = None if encoding_BE is None or not bank.config.uses_prior else bank.centre(encoding_BE)
        state = bank.begin(centred, row_of_token)
        state.shared.observe = None if self.growing is None else self.growing.observe
        if self._removed is not None and self._removed[0] == name:
            state.shared.removed = self._removed[1]
        return state

    def _end_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        super()._end_pass(model, args, kwargs, output)
        states, self._under_way = self._under_way, {}
        if states:
            self._record(states)

    def _routes_of(self, states: States) -> dict[str, list[Tensor]]:
        return routes_of(states)

    @property
    def carries_routes(self) -> bool:
        """Whether a pass's routing state travels as a keyword of the decoder layers."""
        return self._has_carriers

    @contextmanager
    def without_atom(self, atom: int, adapter_name: str = "default") -> Iterator[None]:
        """Route as if the bank lacked one atom, in every block, inside the ``with``.

        The next best atoms take its place among the top k, and the weights sum to 1 again. What the others would have
        learnt without it is another question: keys and queries stay as they were trained beside it.

        Raises:
            ValueError: There is no such adapter or atom, or no other atom.
        """
        if adapter_name not in self.queryable_bank:
            raise ValueError(f"no adapter {adapter_name!r}; there are {', '.join(self.queryable_bank)}")
        num_atoms = self._bank(adapter_name).config.num_atoms
        if not 0 <= atom < num_atoms:
            raise ValueError(f"adapter {adapter_name!r} has atoms 0 to {num_atoms - 1}, not {atom}")
        if num_atoms == 1:
            raise ValueError(f"adapter {adapter_name!r} has one atom alone: without it there is nothing to route to")
        before, self._removed = self._removed, (adapter_name, atom)
        try:
            yield
        finally:
            self._removed = before

    # -- instructions -------------------------------------------------------------------------------------------------

    def encode_instruction(self, ids_BL: Tensor) -> Tensor:
        """Encode instructions by the mean of the frozen input embeddings.

        Args:
            ids_BL: Token ids, (B, L), negative where padded; a row of padding alone means "no instruction".

        Returns:
            Encodings, (B, E), float32, not yet centred; zeros where there is no instruction.
        """
        embedding = cast(PreTrainedModel, self.model).get_input_embeddings()
        mask = (ids_BL >= 0).unsqueeze(-1)
        with torch.no_grad():
            vectors = embedding(ids_BL.clamp_min(0)).float() * mask
            return vectors.sum(dim=1) / mask.sum(dim=1).clamp_min(1)

    @torch.no_grad()
    def set_instruction_reference(self, encodings_nE: Tensor) -> None:
        """Fix the mean that is subtracted from every instruction's encoding, before the first stage and for good.

        Args:
            encodings_nE: Encodings of general instructions, (n, E); their mean becomes the reference.
        """
        for bank in map(self._bank, self.queryable_bank):
            if bank.config.uses_prior:
                bank.instruction_reference.copy_(encodings_nE.mean(dim=0))

    def accounting(self, adapter_name: str = "default") -> dict[str, dict[str, int]]:
        """Count parameters and FLOPs of one adapter by component, beside plain LoRA's of the same rank and targets.

        FLOPs are those of matrix products in a forward pass (2 per multiply-add); ``flops_per_row`` are spent once a
        row (the prior), ``flops_per_token`` once a token.

        Returns:
            Component ("A", "B", "bank", "keys", "query_maps", "prior", "total", "lora") -> "parameters" (trainable),
            "flops_per_token", "flops_per_row".
        """
        from continual.adapters.queryable.accounting import account

        return account(self._bank(adapter_name), list(self._layers(adapter_name)), adapter_name)

    # -- layers and blocks --------------------------------------------------------------------------------------------

    def _bank(self, adapter_name: str) -> AtomBank:
        return cast(AtomBank, self.queryable_bank[adapter_name])

    def _instruction_dim(self, model: nn.Module, config: QueryableLoraConfig) -> int:
        if not config.uses_prior:
            return 0
        if config.instruction_dim is None:
            try:
                embedding = cast(PreTrainedModel, model).get_input_embeddings()
            except (AttributeError, NotImplementedError):
                raise ValueError(
                    "prior_weight is above 0 but the backbone has no input embeddings to encode instructions with: "
                    "set instruction_dim to the width of the encodings that you pass, or prior_weight to 0"
                ) from None
            config.instruction_dim = cast(nn.Embedding, embedding).weight.shape[1]
        return cast(int, config.instruction_dim)

    def _arrange(self, model: nn.Module, adapter_name: str) -> None:
        num_blocks = cast(QueryableLoraConfig, self.peft_config[adapter_name]).num_blocks
        groups: dict[str, list[QueryableLinear]] = {}
        for name, module in model.named_modules():
            if isinstance(module, QueryableLinear) and adapter_name in module.queryable_A:
                groups.setdefault(layer_of(name), []).append(module)
        if num_blocks > len(groups):
            raise ValueError(f"num_blocks ({num_blocks}) is larger than the number of adapted layers ({len(groups)})")
        for index, layers in enumerate(groups.values()):
            block = index * num_blocks // len(groups)
            for layer in layers:
                layer.blocks[adapter_name] = block
        first: dict[int, QueryableLinear] = {}
        for layers in groups.values():
            first.setdefault(layers[0].blocks[adapter_name], layers[0])
        for layer in first.values():
            layer.leads.add(adapter_name)


register_peft_method(name=PEFT_NAME.lower(), config_cls=QueryableLoraConfig, model_cls=QueryableLoraModel)
