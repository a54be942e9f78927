"""What each function of compat/ is checked to do with the libraries that are installed."""

from __future__ import annotations

from collections.abc import Callable

from contracts import Function

CHECKS: dict[Function, Callable[[], None]] = {}
"""Function of compat/ -> what fails where it does not do what it stands in for."""


def checks(*functions: Function) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Enter a check of some functions."""

    def enter(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS.update(dict.fromkeys(functions, check))
        return check

    return enter
