"""Private names of other packages appear in continual/compat/ alone; the checker that says so is itself tried."""

from __future__ import annotations

import pytest
from contracts import ROOT, findings
from private_names import lean_on, sources

from continual.compat.overrides import OVERRIDES


def test_private_names_of_other_packages_appear_in_compat_alone() -> None:
    assert len(sources(ROOT)) > 150
    assert findings().lines == []


def test_every_override_that_is_listed_exists() -> None:
    assert set(findings().overrides) == {override.name.partition("(")[0] for override in OVERRIDES}


OURS = """
from lightning import LightningModule
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

class Tuner(BaseTuner):
    _own = 1

    def __init__(self):
        self._kept = []

    def _create_and_replace(self, *args):
        super()._create_and_replace(*args)

    def _add(self, other: "Tuner"):
        return self._own + len(self._kept) + len(other._kept)
"""
ALLOWED = {"peft.tuners.tuners_utils.BaseTuner._create_and_replace"}


def told(text: str, path: str = "continual/new.py") -> list[str]:
    lines = lean_on({"continual/ours.py": OURS, path: text}, ALLOWED).lines
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.split(": ")[1] for line in lines]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import os\nos._exit(1)",
        "from continual.ours import Tuner\ndef f(t: Tuner): return t._kept",
        "from continual.ours import Tuner\nclass More(Tuner):\n    def f(self): return self._own",
        "from continual.ours import Tuner\nclass More(Tuner):\n    def _create_and_replace(self, *a): ...",
        "from continual.ours import _helper",
        "class Own:\n    def __init__(self): self._parameters = {}\n    def f(self): return self._parameters",
        "import sys\nsys.stdout = None",
    ],
)
def test_what_is_ours_is_left_alone(text: str) -> None:
    assert told(text) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("from peft.utils.other import _freeze_adapter", "imports peft.utils.other._freeze_adapter"),
        ("import torch._dynamo", "imports torch._dynamo"),
        ("def f():\n    from torch._dynamo import config", "imports torch._dynamo.config"),
        ("from importlib import import_module\nimport_module('torch._dynamo')", "imports torch._dynamo"),
        ("import torch\ntorch._foreach_norm([])", "uses torch._foreach_norm"),
        ("def f(trainer): return trainer._signal_connector", "uses trainer._signal_connector"),
        ("def f(trainer): trainer.strategy._ddp_kwargs = {}", "uses trainer.strategy._ddp_kwargs"),
        ("def f(layer): return getattr(layer, '_active_adapter', None)", "uses layer._active_adapter"),
        ("def f(layer): vars(layer)['_active_adapter'] = 'x'", "uses layer._active_adapter"),
        ("def f(method): return method.__wrapped__", "looks inside of a function by __wrapped__"),
        (
            "from transformers import masking_utils\nmasking_utils.find_packed_sequence_indices = None",
            "replaces transformers.masking_utils.find_packed_sequence_indices",
        ),
        (
            "from continual.ours import Tuner\nclass More(Tuner):\n    def f(self): self._replace_module()",
            "uses self._replace_module",
        ),
        (
            "from continual.ours import Tuner\nclass More(Tuner):\n    def f(self): super()._replace_module()",
            "uses super()._replace_module",
        ),
        (
            "from continual.ours import Tuner\nclass More(Tuner):\n    def _replace_module(self, *a): ...",
            "More overrides peft.tuners.tuners_utils.BaseTuner._replace_module, which compat/overrides.py lacks",
        ),
        (
            "from peft.tuners.tuners_utils import BaseTunerLayer as B\nclass L(B):\n    _disable_adapters = True",
            "L overrides peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters, which compat/overrides.py lacks",
        ),
        (
            "from lightning import LightningModule\nclass M(LightningModule):\n    def f(self): self._trainer = None",
            "uses self._trainer",
        ),
        # A class of ours has an attribute of that name; a module of torch has it for itself.
        ("class Own:\n    _buffers = {}\ndef f(module): return module._buffers", "uses module._buffers"),
    ],
)
@pytest.mark.parametrize("package", ["continual", "tasks", "analysis"])
def test_a_private_name_of_another_package_is_told(package: str, text: str, what: str) -> None:
    assert told(text, f"{package}/new.py") == [what]


def test_compat_is_where_they_may_be() -> None:
    assert told("import torch._dynamo", "continual/compat/new.py") == []
