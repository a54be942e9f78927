"""What compat/ stands in for is as it was read, in the versions that are installed; a line says what is not."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from contracts import (
    Function,
    broken,
    broken_override,
    findings,
    functions,
    moved,
    name_of,
    stand_in,
    users,
    users_of,
)

from continual.compat import peft as compat_peft
from continual.compat.overrides import OVERRIDES, Override
from continual.compat.stand_in import stands_in_for


@pytest.mark.parametrize("function", functions(), ids=name_of)
def test_the_names_are_as_they_were_read(function: Function) -> None:
    assert hasattr(function, "stand_in"), f"{name_of(function)} does not say what it stands in for"
    assert stand_in(function).library == name_of(function).partition(".")[0]
    assert not (lines := broken(function)), lines[0]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override.name.partition("(")[0])
def test_the_overridden_methods_take_what_they_took(override: Override) -> None:
    assert (found := broken_override(override)) is None, found


@pytest.mark.parametrize("function", functions(), ids=name_of)
def test_every_function_is_used(function: Function) -> None:
    assert users_of(function)


# -- the lines themselves ---------------------------------------------------------------------------------------------


def test_a_name_that_is_gone_is_told_with_version_and_files() -> None:
    noted = stands_in_for("peft.tuners.tuners_utils.BaseTuner._gone", read_in="0.21.2")(compat_peft.replace_module)
    try:
        (told,) = broken(noted)
    finally:
        replace = "peft.tuners.tuners_utils.BaseTuner._replace_module(self, parent, child_name, new_module, child)"
        stands_in_for(replace, read_in="0.21.2")(compat_peft.replace_module)
    assert told == (
        f"peft {version('peft')} is installed, and peft.tuners.tuners_utils.BaseTuner._gone is gone (read in 0.21.2): "
        "mend continual/compat/peft.py (replace_module); it is leaned on in continual/adapters/tuner.py"
    )
    assert broken(compat_peft.replace_module) == []


def test_an_override_that_moved_is_told_with_version_and_files() -> None:
    method = "lightning.pytorch.cli.LightningCLI._set_seed"
    assert broken_override(Override(f"{method}(self, seed)", "", "2.6.6")) == (
        f"lightning {version('lightning')} is installed, and {method} takes (self) in the place of (self, seed) "
        "(read in 2.6.6): mend the methods that override it; it is leaned on in continual/cli.py"
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("torch._foreach_norm", None),
        ("torch._foreach_normal", "torch._foreach_normal is gone"),
        ("torch._foreach.norm", "torch._foreach.norm is gone"),
        ("lightning.pytorch.Trainer._signal_connector", None),  # written to an object, not there on the class
        ("lightning.pytorch.Trainer._connector", "lightning.pytorch.Trainer._connector is gone"),
        ("peft.tuners.tuners_utils.BaseTuner._replace_module", None),
        (
            "transformers.masking_utils.find_packed_sequence_indices(positions)",
            "transformers.masking_utils.find_packed_sequence_indices takes (position_ids) in the place of (positions)",
        ),
    ],
)
def test_a_name_is_looked_up(name: str, what: str | None) -> None:
    assert moved(name) == what


def test_files_that_use_a_function_are_found() -> None:
    assert users()["transformers.checkpointing_of"] == [
        "continual/adapters/queryable/carrier.py",
        "continual/training/compiled.py",
    ]
    assert "continual/config/messages.py" in users()["jsonargparse.faulty_keys"]
    assert findings().overrides["lightning.pytorch.cli.LightningCLI._set_seed"] == ["continual/cli.py"]
    assert users_of(compat_peft.adalora_adapter) == ["continual/adapters/adalora.py"]
