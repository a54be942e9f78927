"""Checks of continual/compat/jsonargparse.py: each message is brought about, and read."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from behaviour import checks
from jsonargparse import ArgumentParser

from continual.compat import jsonargparse as compat


class Base(abc.ABC):
    """What a configuration names a class of."""

    @abc.abstractmethod
    def turn(self) -> None:
        """Turn."""


class Wheel(Base):
    """A class with a size."""

    def __init__(self, size: int = 1, kind: Literal["a", "b"] | None = None) -> None:
        self.size, self.kind = size, kind

    def turn(self) -> None:
        """Turn."""


@dataclass
class Part:
    """A group of keys with a class among them."""

    name: str
    wheel: Base


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--number", type=int, default=1)
    made.add_argument("--maybe", type=int | None, default=None)
    made.add_argument("--base", type=Base, default=None)
    made.add_argument("--optional", type=Base | None, default=None)
    made.add_argument("--parts", type=list[Part], default=[])
    made.add_argument("--make", type=Callable[[str], Wheel], default=Wheel)
    made.add_class_arguments(Wheel, "wheel")
    return made


WHEEL = f"{__name__}.Wheel"


def said(**tree: Any) -> str:
    """Return what is said of a configuration."""
    try:
        parser().parse_object(tree)
    except Exception as error:
        return str(error)
    raise AssertionError(f"nothing is said of {tree}")


@checks(compat.keys_of)
def keys_are_all_there() -> None:
    keys = compat.keys_of(parser())
    assert {"number", "maybe", "base", "parts", "wheel.size", "wheel.kind"} <= set(keys)


@checks(compat.subcommands_of)
def a_subcommand_is_added() -> None:
    made, inner = parser(), parser()
    made.add_subcommands()
    compat.subcommands_of(made).add_subcommand("go", inner, help="go")
    assert made.parse_args(["go", "--number=3"]).go.number == 3


@checks(compat.faulty_keys)
def keys_at_fault_are_named() -> None:
    assert compat.faulty_keys(said(number="x")) == ["number"]
    assert compat.faulty_keys(said(wheel={"size": "x"})) == ["wheel.size"]
    assert compat.faulty_keys(said(base={"class_path": WHEEL, "init_args": {"size": "x"}})) == ["base", "size"]


@checks(compat.faulty_classes, compat.given_classes)
def classes_at_fault_are_named() -> None:
    message = said(base={"class_path": WHEEL, "init_args": {"sise": 1}})
    assert compat.faulty_classes(message) == [WHEEL]
    made = said(make={"class_path": WHEEL, "init_args": {"sise": 1}})
    assert compat.faulty_classes(made) == [] and compat.given_classes(made) == [WHEEL]


@checks(compat.unknown_option)
def an_unknown_key_is_named() -> None:
    assert compat.unknown_option(said(numbre=1)) == (None, "numbre")
    assert compat.unknown_option(said(wheel={"sise": 1})) == ("wheel", "sise")
    assert compat.unknown_option(said(number="x")) is None


@checks(compat.unknown_option_of_subcommand)
def an_unknown_key_of_a_subcommand_is_named() -> None:
    parser, inner = (ArgumentParser(exit_on_error=False) for _ in range(2))
    inner.add_argument("--number", type=int)
    parser.add_subcommands().add_subcommand("count", inner)
    with pytest.raises(Exception) as caught:
        parser.parse_object({"subcommand": "count", "count": {"numbre": 1}})
    assert compat.unknown_option_of_subcommand(str(caught.value)) == ("count", "numbre")
    assert compat.unknown_option_of_subcommand(said(numbre=1)) is None


@checks(compat.missing_name)
def a_missing_class_is_named() -> None:
    assert compat.missing_name(said(base={"class_path": f"{__name__}.Wheell"})) == (__name__, "Wheell")
    assert compat.missing_name(said(number="x")) is None


@checks(compat.inside_optional)
def the_error_of_an_optional_class_is_found() -> None:
    inner = compat.inside_optional(said(optional={"class_path": WHEEL, "init_args": {"size": "x"}}))
    assert inner is not None and compat.unmatched_type(inner) is not None
    assert compat.inside_optional(said(number="x")) is None


@checks(compat.unmatched_union)
def types_of_a_union_are_named() -> None:
    assert compat.unmatched_union(said(maybe="x")) == (["int", "NoneType"], "x")
    kinds, value = compat.unmatched_union(said(wheel={"kind": "c"})) or ([], "")
    assert (kinds, value) == (["'a'", "'b'", "NoneType"], "c")
    assert compat.unmatched_union(said(number="x")) is None


@checks(compat.unmatched_type)
def a_type_is_named() -> None:
    assert compat.unmatched_type(said(number="x")) == ("int", "x")
    assert compat.unmatched_type(said(numbre=1)) is None


@checks(compat.class_without_path)
def a_class_without_a_path_is_named() -> None:
    assert compat.class_without_path(said(parts=[{"name": "one", "wheel": {"init_args": {"size": 1}}}])) == "Base"
    assert compat.class_without_path(said(number="x")) is None


@checks(compat.path_without_module)
def a_path_without_a_module_is_named() -> None:
    assert compat.path_without_module(said(base={"class_path": "Whel"})) == "Whel"
    assert compat.path_without_module(said(number="x")) is None


@checks(compat.without_places)
def places_are_left_out() -> None:
    message = said(base={"class_path": "nowhere.Wheel"})
    rest = compat.without_places(message)
    assert "nowhere" in rest and "Parser key" not in rest and "Problem with" not in rest and "\n" not in rest
