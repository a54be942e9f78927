"""What we lean on inside jsonargparse (read in 4.53): lists of a parser, and the wording of what it complains about."""

from __future__ import annotations

import re
from typing import Any

from continual.compat.stand_in import stands_in_for

_READ_IN = "4.53.0"

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_GIVEN_CLASS = re.compile(r"class_path='([^']+)'")
_OPTION = re.compile(r"(?:Group '([^']+)' does not accept option|Option) '([^']+)'(?: is not accepted)?")
_SUBCOMMAND = re.compile(r"Subcommand '([^']+)' does not accept option '([^']+)'")
_UNION = re.compile(r"Subtypes: \[(.*?)\]\s*Errors:.*Given value: (.*?)(?:\. Got value: .*)?$", re.DOTALL)
_OPTIONAL = re.compile(  # a class or null, given by a class_path
    r"Subtypes: \[<class '[^']+'>, <class 'NoneType'>\]\s*Errors:\s*- (.*?)\s*"
    r"- Expected a <class 'NoneType'>.*class_path",
    re.DOTALL,
)
_PLAIN = re.compile(r"Expected a <class '([^']+)'>\. Got value: (.*)", re.DOTALL)
_NOT_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)\. Got value: \{")
_NO_DOT = re.compile(r"Expected a dot import path string: (\S+)")
_MISSING_NAME = re.compile(r"module '([^']+)' has no attribute '([^']+)'")

# -- parsers ----------------------------------------------------------------------------------------------------------


@stands_in_for("jsonargparse.ArgumentParser._actions", read_in=_READ_IN)
def keys_of(parser: Any) -> list[str]:
    """Return the dotted keys that a parser takes."""
    return [action.dest for action in parser._actions if action.dest]


@stands_in_for("jsonargparse.ArgumentParser._actions", read_in=_READ_IN)
def subcommands_of(parser: Any) -> Any:
    """Return a parser's list of subcommands, to which ``add_subcommand`` adds."""
    return next(action for action in parser._actions if hasattr(action, "add_subcommand"))


# -- messages ---------------------------------------------------------------------------------------------------------


@stands_in_for("jsonargparse", read_in=_READ_IN)
def faulty_keys(message: str) -> list[str]:
    """Return the keys that a message is about, the outermost first; each is relative to the one before."""
    return _KEY.findall(message)


@stands_in_for("jsonargparse", read_in=_READ_IN)
def faulty_classes(message: str) -> list[str]:
    """Return the class paths whose arguments are at fault, the outermost first."""
    return _CLASS.findall(message)


@stands_in_for("jsonargparse", read_in=_READ_IN)
def given_classes(message: str) -> list[str]:
    """Return the class paths in the values that a message repeats."""
    return _GIVEN_CLASS.findall(message)


@stands_in_for("jsonargparse", read_in=_READ_IN)
def unknown_option(message: str) -> tuple[str | None, str] | None:
    """Return the group, if any, and the key that it does not take; None of another message."""
    found = _OPTION.search(message)
    return (found[1], found[2]) if found else None


@stands_in_for("jsonargparse", read_in=_READ_IN)
def unknown_option_of_subcommand(message: str) -> tuple[str, str] | None:
    """Return the subcommand and the key that it does not take; None of another message."""
    found = _SUBCOMMAND.search(message)
    return (found[1], found[2]) if found else None


@stands_in_for("jsonargparse", read_in=_READ_IN)
def missing_name(message: str) -> tuple[str, str] | None:
    """Return a module and the name that it lacks; None of another message."""
    found = _MISSING_NAME.search(message)
    return (found[1], found[2]) if found else None


@stands_in_for("jsonargparse", read_in=_READ_IN)
def inside_optional(message: str) -> str | None:
    """Return what is wrong with a class where null would do as well; None of another message."""
    found = _OPTIONAL.search(message)
    return found[1] if found else None


@stands_in_for("jsonargparse", read_in=_READ_IN)
def unmatched_union(message: str) -> tuple[list[str], str] | None:
    """Return the names of the types that would do, and the value that is of none; None of another message."""
    if not (found := _UNION.search(message)):
        return None
    kinds = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", found[1])
    return re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kinds).split(", "), found[2]


@stands_in_for("jsonargparse", read_in=_READ_IN)
def unmatched_type(message: str) -> tuple[str, str] | None:
    """Return the name of a type and the value that is not of it; None of another message."""
    found = _PLAIN.search(message)
    return (found[1], found[2]) if found else None


@stands_in_for("jsonargparse", read_in=_READ_IN)
def class_without_path(message: str) -> str | None:
    """Return the name of the class that is wanted where no class_path is given; None of another message."""
    found = _NOT_SUBCLASS.search(message)
    return found[1] if found else None


@stands_in_for("jsonargparse", read_in=_READ_IN)
def path_without_module(message: str) -> str | None:
    """Return a class path that names no module; None of another message."""
    found = _NO_DOT.search(message)
    return found[1] if found else None


@stands_in_for("jsonargparse", read_in=_READ_IN)
def without_places(message: str) -> str:
    """Return a message on one line, without those lines that say where in a configuration it is."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if line and not _KEY.match(line) and not _CLASS.match(line)) or message
