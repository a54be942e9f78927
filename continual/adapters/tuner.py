"""What our PEFT tuners share: exact targets, no half of an adapter left behind, recorded routes, no merging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from continual.adapters.base_config import RoutedLoraConfig
from continual.adapters.routed_linear import CANNOT_MERGE, RoutedLinear
from continual.compat.peft import is_target, replace_module, set_active
from continual.interfaces import RowSelector

# Where transformers keeps q/k/v/o projections under other names, the user names target_modules.
_ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
_LLAMA_LIKE = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2"]
_DEFAULT_TARGETS = dict.fromkeys(_LLAMA_LIKE, _ATTENTION) | {
    "phi3": ["o_proj", "qkv_proj"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["dense", "query_key_value"],
}


class LayerTuner(BaseTuner):
    """A PEFT tuner that puts a layer of its own, ``tuner_layer_cls``, around each module that it targets."""

    tuner_layer_cls: Any

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            self._update_layer(target, adapter_name, peft_config, current_key)
            return
        layer = self._layer_around(target, current_key)
        set_active(layer, self.active_adapters)
        self._update_layer(layer, adapter_name, peft_config, current_key)
        replace_module(self, parent, target_name, layer, target)

    def _layer_around(self, target: nn.Module, place: str) -> Any:
        """Return a layer around ``target``, which the model calls ``place``."""
        return self.tuner_layer_cls(target)

    def _update_layer(self, layer: Any, adapter_name: str, config: Any, place: str) -> None:
        """Add the adapter to a layer."""
        layer.update_layer(adapter_name, config)


class RoutedTuner(LayerTuner):
    """A PEFT tuner whose layers are ``RoutedLinear`` and route each token by its own state.

    A subclass names its ``prefix`` and ``tuner_layer_cls``, numbers the layers (``_arrange``) and gives them a fresh
    state before each forward pass (``_begin_pass``).
    """

    tuner_layer_cls: Any = RoutedLinear
    growing: RowSelector | None = None
    """What decides which adapters a pass uses, where the bank grows; otherwise all active ones are."""
    target_module_mapping = _DEFAULT_TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Create the layers of ``adapter_name``. PEFT calls this for every adapter.

        Raises:
            ValueError: A target module matches nothing, even if others match.
        """
        config = cast(RoutedLoraConfig, self.peft_config[adapter_name])
        self._check_targets(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._arrange(model, adapter_name)
        except Exception:  # leave no half of an adapter behind: it would be saved with the others
            for layer in list(self._layers(adapter_name)):
                layer.delete_adapter(adapter_name)
            raise
        if config.target_modules is not None and not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules)  # PEFT's defaults and 'all-linear' come as a set
        self._install_hooks(model)

    def _arrange(self, model: nn.Module, adapter_name: str) -> None:
        """Number the new layers."""
        raise NotImplementedError

    def _begin_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Give the layers a fresh state (a forward pre-hook of the model)."""
        raise NotImplementedError

    def auxiliary_loss(self) -> Tensor | None:
        """Return what the adapter itself adds to the loss of the last forward pass in training; None for nothing."""
        return None

    @contextmanager
    def record_routes(self, most: int | None = None) -> Iterator[list[dict[str, list[Tensor]]]]:
        """Collect the routes of every forward pass made inside the ``with``, or of the first ``most`` ones.

        Yields:
            A list that gains one entry a pass: adapter name -> routes of each block, (..., M).
        """
        record: list[dict[str, list[Tensor]]] = []
        self._recorders.append((record, most))
        try:
            yield record
        finally:
            self._recorders = [other for other in self._recorders if other[0] is not record]

    def _record(self, states: Any) -> None:
        """Let whoever records have the routes of the pass."""
        for record, most in self._recorders:
            if most is None or len(record) < most:
                record.append(self._routes_of(states))

    def _routes_of(self, states: Any) -> dict[str, list[Tensor]]:
        """Return the routes of each adapter in a pass's states, of each block or layer."""
        return {name: state.routes for name, state in states.items()}

    def _install_hooks(self, model: nn.Module) -> None:
        for handle in getattr(self, "_hooks", []):
            handle.remove()
        self._recorders: list[tuple[list[dict[str, list[Tensor]]], int | None]] = []
        self._adapted: list[Any] = [m for m in model.modules() if isinstance(m, self.tuner_layer_cls)]
        self._hooks = [
            model.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
            model.register_forward_hook(self._end_pass, with_kwargs=True, always_call=True),
        ]

    def _give(self, states: dict[str, Any] | None) -> None:
        for layer in self._adapted:
            layer.give(states)

    def _end_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._give(None)

    def _layers(self, adapter_name: str) -> Iterator[Any]:
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls) and adapter_name in module.scaling:
                yield module

    def _check_targets(self, model: nn.Module, config: RoutedLoraConfig) -> None:
        targets = config.target_modules
        if targets is None or isinstance(targets, str):
            return  # one expression: PEFT itself raises when it matches nothing
        names = [name for name, _ in model.named_modules() if is_target(self, config, name)]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                linear = (name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear))
                raise ValueError(
                    f"target module {target!r} matches nothing in the model (exclude_modules and layers_to_transform "
                    f"applied); its linear layers: {', '.join(sorted(set(linear)))}"
                )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        layers = list(self._layers(adapter_name))
        trainable = layers[0].trains(adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in layers:  # a cast makes new parameters, and those start trainable
            layer.set_requires_grad(adapter_name, trainable)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: routing depends on the input."""
        raise ValueError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise ValueError(CANNOT_MERGE)
        for handle in self._hooks:
            handle.remove()
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def is_routed(model: Any) -> bool:
    """Say whether a PEFT model carries one of our routed adapters."""
    return isinstance(getattr(model, "base_model", None), RoutedTuner)
