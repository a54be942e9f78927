"""Each function of compat/ does what it stands in for, with the libraries that are installed."""

from __future__ import annotations

import jsonargparse_checks  # noqa: F401
import lightning_checks  # noqa: F401
import peft_checks  # noqa: F401
import pytest
import torch_checks  # noqa: F401
import transformers_checks  # noqa: F401
from behaviour import CHECKS
from contracts import Function, functions, line, name_of, stand_in

from continual.errors import one_line


def check(function: Function) -> None:
    """Raise AssertionError, with the line that says whose contract it is, where a function's check fails."""
    try:
        CHECKS[function]()
    except Exception as error:
        names = ", ".join(name.partition("(")[0] for name in stand_in(function).names)
        why = one_line(error, 200)
        raise AssertionError(line(function, f"{names}: no longer as it was ({why})")) from error


@pytest.mark.parametrize("function", functions(), ids=name_of)
def test_it_does_what_it_did(function: Function) -> None:
    assert function in CHECKS, f"{name_of(function)} has no check"
    check(function)


def test_a_check_that_fails_says_whose_contract_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    (function,) = (each for each in functions() if name_of(each) == "torch.each_norm")
    monkeypatch.setitem(CHECKS, function, lambda: [][0])
    with pytest.raises(
        AssertionError, match=r"^torch 2\..* is installed, and torch\._foreach_norm: no longer as it "
    ) as told:
        check(function)
    assert "continual/callbacks/gradients.py" in str(told.value)
