"""Private methods that our subclasses override and the libraries call, with the parameters that were read.

They stay in the classes that need them. Nobody may override another without listing it here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Override:
    """A private method of a library's class that a subclass of ours overrides.

    Attributes:
        name: The method's dotted path, with its parameters.
        calls: When the library calls it.
        read_in: The library's version in which that was read.
    """

    name: str
    calls: str
    read_in: str


_TUNER = "peft.tuners.tuners_utils.BaseTuner"
_CLI = "lightning.pytorch.cli.LightningCLI"

OVERRIDES = (
    Override(
        f"{_TUNER}._create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, "
        "parameter_name=None)",
        "for each module that a configuration targets, as an adapter is added",
        "0.21.2",
    ),
    Override(
        f"{_TUNER}._cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True)",
        "once an adapter is added: its tensors in half precision become float32",
        "0.21.2",
    ),
    Override(
        f"{_TUNER}._enable_adapter_layers(self, enabled=True)",
        "as adapters are switched on or off",
        "0.21.2",
    ),
    Override(
        f"{_TUNER}._unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, "
        "adapter_names=None)",
        "by unload and merge_and_unload, to give the backbone back",
        "0.21.2",
    ),
    Override(
        f"{_CLI}._add_subcommands(self, parser, **kwargs)",
        "as the parser is set up, to give it a subcommand for each of the trainer's methods",
        "2.6.6",
    ),
    Override(f"{_CLI}._set_seed(self)", "after parsing, before anything is built", "2.6.6"),
    Override(f"{_CLI}._run_subcommand(self, subcommand)", "last, once everything is built", "2.6.6"),
)
