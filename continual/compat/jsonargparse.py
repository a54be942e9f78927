"""What we lean on inside jsonargparse (read in 4.53)."""

from __future__ import annotations

from typing import Any


def keys_of(parser: Any) -> list[str]:
    """Return the dotted keys that a parser takes.

    Stands in for: ``ArgumentParser._actions``, argparse's own list of what a parser takes.
    """
    return [action.dest for action in parser._actions if action.dest]
