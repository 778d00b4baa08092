"""Settings from YAML: read key by key against the types of a dataclass, faults named with their line."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from hf_ws.errors import PlanError

T = TypeVar("T")


class Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, as in YAML 1.2."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_settings(path: str | Path, kind: type) -> dict[str, Any]:
    """The settings in a YAML file, its keys and their types checked against a dataclass; blocks stay mappings.

    Raises:
        PlanError: No such file, not a mapping, an unknown or repeated key, a wrong type; with the line.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read as a settings file: {error}") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise PlanError(f"{path} must hold `key: value` lines, one a setting")
    return _mapping(root, kind, str(path), "")


def _mapping(root: yaml.MappingNode, kind: type, path: str, prefix: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key_node, value_node in root.value:
        where = f"{path}, line {key_node.start_mark.line + 1}"
        key = Loader("").construct_object(key_node)
        if key not in hints:
            raise PlanError(f"{where}: unknown key {prefix + str(key)!r}{_near(key, hints, prefix)}")
        if key in values:
            raise PlanError(f"{where}: {prefix + key!r} is set a second time; keep one")
        block = block_of(hints[key])
        if block is not None and isinstance(value_node, yaml.MappingNode):
            values[key] = _mapping(value_node, block, path, f"{prefix}{key}.")
            continue
        value = Loader("").construct_object(value_node, deep=True)
        if isinstance(value, str) and list[str] == hints[key]:
            value = [value]
        if not fits(value, hints[key]):
            raise PlanError(f"{where}: {prefix}{key}={value!r}; allowed: {say(hints[key])}")
        values[key] = value
    return values


def made(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """A block of settings from a mapping.

    Raises:
        PlanError: A key that the block does not have, one that it wants, a wrong type.
    """
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise PlanError(f"unknown key {f'{name}.{key}'!r}{_near(key, hints, f'{name}.')}")
    for one in fields(kind):  # type: ignore[arg-type]
        if one.name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise PlanError(f"{name} has no {one.name!r}; allowed: {say(hints[one.name])}")
    block = kind(**values)
    if faults := list(check_types(block, f"{name}.")):
        raise PlanError("training settings: " + "; and ".join(faults))
    return block


def check_types(block: Any, prefix: str = "") -> typing.Iterator[str]:
    """The fields of a frozen dataclass whose values have another type than declared; whole numbers become floats."""
    for name, hint in typing.get_type_hints(type(block)).items():
        value = getattr(block, name)
        if isinstance(value, int) and not isinstance(value, bool) and float in (hint, *get_args(hint)):
            object.__setattr__(block, name, float(value))
        elif not fits(value, hint):
            yield f"{prefix}{name}={value!r}; allowed: {say(hint)}"


def block_of(hint: Any) -> type | None:
    """The dataclass in `Block | None`; None if it is another type."""
    return next((one for one in (hint, *get_args(hint)) if isinstance(one, type) and is_dataclass(one)), None)


def pair(text: str) -> tuple[str, Any]:
    """A flag's `hidden=512`, the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(text)
    return key, yaml.load(value, Loader=Loader)  # noqa: S506 - a SafeLoader


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(fits(item, get_args(hint)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(part, one) for item in value.items() for part, one in zip(item, get_args(hint), strict=True)
        )
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def say(hint: Any) -> str:
    """A type in a user's words."""
    origin = get_origin(hint)
    if hint is Any:
        return "anything"
    if is_dataclass(hint):
        return f"a mapping with {', '.join(one.name for one in fields(hint))}"
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if origin is list:
        return f"a list of {say(get_args(hint)[0])}s"
    if origin is dict:
        return f"a mapping to {say(get_args(hint)[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(say(one) for one in get_args(hint))
    names = {float: "number", int: "whole number", str: "text", bool: "true or false", type(None): "nothing"}
    return names[hint]


def _near(key: object, known: Mapping[str, Any], prefix: str) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""
