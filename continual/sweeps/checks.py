"""Checks of the values in a sweep file; each raises ConfigError with one line that names the place and near names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from continual.config.messages import near
from continual.errors import ConfigError

_FOLDER = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


@contextmanager
def at(place: str) -> Iterator[None]:
    """Put a place before the message of what is wrong there."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def mapping(value: Any, place: str, keys: Sequence[str] | None = None, required: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place} has to be a mapping, got {value!r}")
    if keys is not None:
        known(value, keys, place, "key")
    for key in required:
        if value.get(key) is None:
            raise ConfigError(f"{place} has no {key}")
    return value


def known(names: Iterable[Any], allowed: Iterable[str], place: str, what: str) -> None:
    """Check that all ``names`` are among those allowed; ``what`` says what they name."""
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            hint = near(str(name), allowed) or f"; there are {', '.join(allowed)}"
            raise ConfigError(f"{place}: unknown {what} {name!r}{hint}")


def folder(name: Any, place: str) -> str:
    """Return a name that can be a folder's."""
    if not _FOLDER.fullmatch(str(name)):
        raise ConfigError(f"{place}: {name!r} cannot name a folder: use letters, digits and any of _ . + -")
    return str(name)


def stages(value: Any, names: list[str], place: str) -> list[str]:
    """Return a list of stages, each of ``names`` and there once."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{place} has to list at least one stage, got {value!r}")
    known(value, names, place, "stage")
    if twice := [name for index, name in enumerate(value) if name in value[:index]]:
        raise ConfigError(f"{place} names {twice[0]!r} twice")
    return list(value)


def seeds(value: Any, place: str) -> list[int]:
    """Return a list of seeds, each there once."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{place} has to list at least one seed, got {value!r}: the sweep has no cells")
    for index, seed in enumerate(value):
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"{place}: a seed is an integer of at least 0, got {seed!r}")
        if seed in value[:index]:
            raise ConfigError(f"{place} names {seed} twice")
    return list(value)
