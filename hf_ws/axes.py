"""Axis names, and the small language that spells a parameter's dimensions.

A layout lists a tensor's dimensions in storage order:

    vocab hidden                       a token embedding
    (heads head_dim) <hidden           a query projection: reads hidden, writes heads x head_dim
    hidden <(heads head_dim)           the attention's output projection
    (2 ffn) <hidden                    fused gate and up
    (heads 3 head_dim) <hidden         GPT-NeoX: q, k, v of the first head, then of the second, ...
    (kv_heads (heads head_dim + head_dim + head_dim)) <hidden
                                       Falcon 40B: for each kv head its query heads, its key, its value

A name is an axis, a number a constant factor, a parenthesis a row-major product, `+` concatenates, and `<` marks a
dimension that is *read*: contracted with the activation. Inside a product, `heads` after `kv_heads` counts the
query heads of that kv head only, and `heads:4` is the outer digit of a head's number (CodeGen stores four blocks).

    >>> layout = parse("(kv_heads (heads head_dim + head_dim + head_dim)) <hidden")
    >>> [length(dim, {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32}) for dim in layout]
    [64, 32]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = "hidden", "heads", "kv_heads", "head_dim"
FFN, MOE_FFN, EXPERTS = "ffn", "moe_ffn", "experts"
VOCAB, POSITIONS, EMBEDDING, LABELS, LAYERS = "vocab", "positions", "embedding", "labels", "layers"

SHARED_FFN, INNER, STATE, GROUPS = "shared_ffn", "inner", "state", "groups"
Q_RANK, KV_RANK, ROPE_DIM, NOPE_DIM, V_DIM = "q_rank", "kv_rank", "rope_dim", "nope_dim", "v_dim"
QUERIES, CODES, PROJECTION, UNIT, WAVES = "queries", "codes", "projection", "unit", "waves"
RANK = "rank"

AXES = (
    *(
        HIDDEN,
        UNIT,
        WAVES,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        FFN,
        MOE_FFN,
        SHARED_FFN,
        EXPERTS,
        INNER,
        STATE,
        GROUPS,
    ),
    *(RANK, Q_RANK, KV_RANK, ROPE_DIM, NOPE_DIM, V_DIM, QUERIES, CODES, PROJECTION),
    *(VOCAB, POSITIONS, EMBEDDING, LABELS, LAYERS),
)
"""Every kind of axis this library knows, in the order tables print them.

A model of several stacks has several axes of a kind. The text part's are called as above; others say before a dot
whose they are (`vision_config.hidden`, `decoder.heads`), and after a dot of which stage (`hidden.2`).
"""


def kind_of(axis: str) -> str:
    """What kind of axis this is: `vision_config.hidden.2` is a `hidden`."""
    return axis.rstrip("0123456789").rstrip(".").rpartition(".")[2]


def sibling(axis: str, kind: str) -> str:
    """The axis of another kind in the same stack and stage."""
    own = kind_of(axis)
    scope, _, stage = axis.rpartition(own)
    return f"{scope}{kind}{stage}"


def layer_key(axis: str, number: int) -> int | str:
    """How a layer is called in maps and evidence."""
    return number if axis == LAYERS else f"{axis}.{number}"


def split_key(key: int | str) -> tuple[str, int]:
    """The layer axis and the number that `layer_key` put together."""
    axis, _, number = str(key).rpartition(".")
    return axis or LAYERS, int(number)


@dataclass(frozen=True)
class Block:
    """`heads:4`: the outer digit of an axis that is stored in `count` blocks."""

    axis: str
    count: int


@dataclass(frozen=True)
class Product:
    """Factors, slowest first."""

    factors: tuple[Expression, ...]


@dataclass(frozen=True)
class Sum:
    """Parts stored one after the other."""

    parts: tuple[Expression, ...]


Expression = str | int | Block | Product | Sum


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor; `reads` when it is contracted with the activation."""

    expression: Expression
    reads: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes it contains, in order of first appearance."""
        return tuple(dict.fromkeys(_axes(self.expression)))


Layout = tuple[Dim, ...]


@cache
def parse(text: str) -> Layout:
    """The layout that `text` spells. Raises ValueError that points at the offending column."""
    tokens = [(m.group(), m.start()) for m in re.finditer(r"[a-z_]\w*(?:\.\w+)*(?::\d+)?|\d+|\S", text)]
    layout: list[Dim] = []
    at = 0
    while at < len(tokens):
        reads = tokens[at][0] == "<"
        expression, at = _atom(text, tokens, at + reads)
        layout.append(Dim(expression, reads))
    return tuple(layout)


def _atom(text: str, tokens: list[tuple[str, int]], at: int) -> tuple[Expression, int]:
    if at >= len(tokens):
        raise _syntax_error(text, len(text), "a name, a number or '('")
    token, column = tokens[at]
    if token == "(":
        return _sum(text, tokens, at + 1)
    if token.isdigit():
        return int(token), at + 1
    axis, _, count = token.partition(":")
    if kind_of(axis) not in AXES:
        raise _syntax_error(text, column, f"one of {', '.join(AXES)}, a number or '('")
    return (Block(axis, int(count)) if count else axis), at + 1


def _sum(text: str, tokens: list[tuple[str, int]], at: int) -> tuple[Expression, int]:
    parts: list[list[Expression]] = [[]]
    while at < len(tokens) and tokens[at][0] != ")":
        if tokens[at][0] == "+" and parts[-1]:
            parts.append([])
            at += 1
        factor, at = _atom(text, tokens, at)
        parts[-1].append(factor)
    if at >= len(tokens) or not all(parts):
        raise _syntax_error(text, tokens[at][1] if at < len(tokens) else len(text), "')'")
    products = [p[0] if len(p) == 1 else Product(tuple(p)) for p in parts]
    return (products[0] if len(products) == 1 else Sum(tuple(products))), at + 1


def _syntax_error(text: str, column: int, expected: str) -> ValueError:
    return ValueError(f"layout not understood, expected {expected}:\n  {text}\n  {' ' * column}^")


def spell(layout: Layout) -> str:
    """The text that `parse` reads as `layout`."""
    return " ".join(("<" if dim.reads else "") + _spell(dim.expression, nested=True) for dim in layout)


def _spell(expression: Expression, *, nested: bool) -> str:
    match expression:
        case Block(axis, count):
            return f"{axis}:{count}"
        case Product(factors):
            text = " ".join(_spell(f, nested=True) for f in factors)
        case Sum(parts):
            text = " + ".join(_spell(p, nested=not isinstance(p, Product)) for p in parts)
        case _:
            return str(expression)
    return f"({text})" if nested else text


def _axes(expression: Expression) -> list[str]:
    match expression:
        case str(axis) | Block(axis):
            return [axis]
        case Product(children) | Sum(children):
            return [axis for child in children for axis in _axes(child)]
    return []


def length(dim: Dim, sizes: Mapping[str, int]) -> int:
    """How long the dimension is when the axes have these sizes."""
    return len(next(iter(coordinates(dim, sizes).values())))


def coordinates(dim: Dim, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """For each position along `dim`, where it lies on each axis, each constant factor and each part of a sum.

    Returns arrays of one length, keyed by axis name, by `#path` for a constant and `+path` for a sum; -1 where a
    part of a sum does not have that axis. The key `""` holds zeros, so that there is always a column.
    """
    columns = _expand(dim.expression, "", {"": np.zeros(1, dtype=np.int64)}, sizes)
    return {name: values for name, values in columns.items() if ":" not in name}


def _expand(
    expression: Expression, path: str, rows: dict[str, np.ndarray], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Each of `rows` repeated once for every position of `expression`, slowest first."""
    match expression:
        case Product(factors):
            for i, factor in enumerate(factors):
                rows = _expand(factor, f"{path}.{i}", rows, sizes)
            return rows
        case Sum(parts):
            return _expand_sum(parts, path, rows, sizes)
        case Block(axis, count):
            return _repeat(rows, f"{axis}:", count)
        case int(constant):
            return _repeat(rows, f"#{path}", constant)
    return _expand_axis(expression, rows, sizes)


def _expand_axis(axis: str, rows: dict[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    blocks = 1
    if f"{axis}:" in rows:
        blocks, outer = int(rows[f"{axis}:"].max()) + 1, rows[f"{axis}:"]
    elif kind_of(axis) == HEADS and (groups := sibling(axis, KV_HEADS)) in rows:
        blocks, outer = sizes[groups], rows[groups]
    inner, rest = divmod(sizes[axis], blocks)
    if rest:
        raise ValueError(
            f"{axis}={sizes[axis]} is stored in {blocks} equal blocks, and is no multiple of {blocks}"
        )
    grown = _repeat(rows, axis, inner)
    if blocks > 1:
        grown[axis] = grown[axis] + np.repeat(outer, inner) * inner
    return grown


def _expand_sum(
    parts: Sequence[Expression], path: str, rows: dict[str, np.ndarray], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    count = len(rows[""])
    branches = []
    for i, part in enumerate(parts):
        marked = rows | {f"+{path}": np.full(count, i), ":origin": np.arange(count)}
        branches.append(_expand(part, f"{path}.{i}", marked, sizes))
    names = list(dict.fromkeys(name for branch in branches for name in branch))
    columns = {
        name: np.concatenate([branch.get(name, np.full(len(branch[""]), -1)) for branch in branches])
        for name in names
    }
    order = np.argsort(columns.pop(":origin"), kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _repeat(rows: dict[str, np.ndarray], name: str, count: int) -> dict[str, np.ndarray]:
    before = len(rows[""])
    grown = {key: np.repeat(values, count) for key, values in rows.items()}
    grown[name] = np.tile(np.arange(count), before)
    return grown


def positions(
    dim: Dim, source: Mapping[str, int], target: Mapping[str, int], maps: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The source position that each target position along `dim` is taken from.

    Args:
        dim: The dimension, spelt once for both models.
        source: Sizes of the source's axes.
        target: Sizes of the target's axes.
        maps: For each axis, the source index of each target index; an axis left out keeps its first indices.

    Returns:
        Integers [target length].
    """
    wanted, present = coordinates(dim, target), coordinates(dim, source)
    key_wanted = np.zeros(len(wanted[""]), dtype=np.int64)
    key_present = np.zeros(len(present[""]), dtype=np.int64)
    there = np.ones(len(key_wanted), dtype=bool)
    radix = 1
    for name, values in present.items():
        asked, base = _mapped(name, wanted[name], maps), int(values.max()) + 2
        there &= asked < base - 1  # an index beyond the source's would carry into the next digit
        key_present += (values + 1) * radix
        key_wanted += (asked + 1) * radix
        radix *= base
    table = np.full(radix, -1, dtype=np.int64)
    table[key_present] = np.arange(len(key_present))
    found = np.where(there, table[np.where(there, key_wanted, 0)], -1)
    if (found < 0).any():
        raise ValueError(f"{spell((dim,))}: the maps ask for positions that the source does not have")
    return found


def _mapped(name: str, index: np.ndarray, maps: Mapping[str, np.ndarray]) -> np.ndarray:
    axis_map = maps.get(name)
    return index if axis_map is None else np.where(index < 0, -1, np.asarray(axis_map)[index])
