"""How long each axis of a miniature is: two sets of lengths, and what ties some of them to others."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from transformers import PreTrainedConfig

from hf_ws.axes import (
    EMBEDDING,
    EXPERTS,
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    KV_RANK,
    LABELS,
    MOE_FFN,
    NOPE_DIM,
    POSITIONS,
    PROJECTION,
    Q_RANK,
    RANK,
    ROPE_DIM,
    SHARED_FFN,
    STATE,
    V_DIM,
    VOCAB,
    kind_of,
    sibling,
)
from hf_ws.sizes import (
    MIXERS,
    field_of,
    near,
    owner,
    regrouped,
    sizes_of,
)

SIZES: tuple[Mapping[str, tuple[int, ...]], ...] = (
    {
        HIDDEN: (135, 150, 165, 195, 210, 225),
        HEADS: (15, 6, 10, 9, 14, 12),
        KV_HEADS: (5, 3, 5, 3, 7, 4),
        HEAD_DIM: (16, 24, 32, 40, 8, 48),
        FFN: (88, 104, 56, 152, 184, 136),
        MOE_FFN: (34, 38, 46, 62, 74, 82),
        SHARED_FFN: (86, 94, 106, 118, 122),
        EXPERTS: (7, 9, 11, 13, 14),
        STATE: (12, 18, 22, 26, 28),
        RANK: (27, 33, 39, 45, 51),
        Q_RANK: (44, 52, 68, 76, 92),
        KV_RANK: (50, 54, 58, 66, 70),
        ROPE_DIM: (8, 12, 4, 16, 20),
        NOPE_DIM: (12, 20, 8, 24, 28),
        V_DIM: (14, 18, 22, 26, 30),
        PROJECTION: (82, 98, 102, 110, 114),
        VOCAB: (211, 223, 227, 229, 233, 241),
        POSITIONS: (71, 73, 79, 83, 89, 91),
        EMBEDDING: (48, 64, 72, 96, 108),
        LABELS: (37,),
    },
    {
        HIDDEN: (138, 159, 171, 183, 201, 213),
        HEADS: (6, 15, 9, 10, 15, 14),
        KV_HEADS: (3, 5, 3, 5, 5, 7),
        HEAD_DIM: (28, 16, 40, 8, 32, 24),
        FFN: (80, 92, 116, 124, 140, 164),
        MOE_FFN: (42, 58, 66, 78, 82, 86),
        SHARED_FFN: (90, 102, 114, 126, 130),
        EXPERTS: (9, 11, 13, 14, 15),
        STATE: (14, 16, 20, 24, 30),
        RANK: (29, 35, 41, 47, 53),
        Q_RANK: (36, 40, 48, 56, 60),
        KV_RANK: (48, 62, 74, 86, 94),
        ROPE_DIM: (12, 8, 20, 4, 16),
        NOPE_DIM: (16, 24, 12, 28, 20),
        V_DIM: (18, 22, 26, 30, 34),
        PROJECTION: (76, 84, 88, 100, 112),
        VOCAB: (239, 241, 251, 257, 263, 269),
        POSITIONS: (97, 101, 103, 107, 109, 113),
        EMBEDDING: (56, 68, 52, 84, 104),
        LABELS: (41,),
    },
)
"""Two sets of lengths by kind of axis, for the first stack, the second, ..."""


def lengths(
    config: PreTrainedConfig, table: Mapping[str, tuple[int, ...]], fixed: Mapping[str, int], tight: int
) -> dict[str, int]:
    """How long each axis is: by the table, but for what is fixed and what a config ties together.

    Args:
        config: The config to be shrunk.
        table: One of `SIZES`.
        fixed: Lengths that a family's miniature cannot do without.
        tight: How much to tie, less than `miniature.TIGHTER`.
    """
    source = sizes_of(config)
    stacks = _stacks(source)
    sizes: dict[str, int] = {}
    for axis in source:
        kind = kind_of(axis)
        scope, _, stage = axis.rpartition(kind)
        if kind in table:
            row = table[kind]
            sizes[axis] = row[stacks.index(f"{scope}{stage}") % len(row)]
    for axis in [axis for axis in sizes if kind_of(axis) == EXPERTS]:
        if (getattr(owner(config, axis), "n_group", None) or 1) > 1:  # routed by groups: as many in each
            sizes[axis] = GROUPED * (3 if table is SIZES[0] else 5)
    sizes |= fixed
    same = regrouped(config)
    sizes |= {axis: sizes[other] for axis, other in same.items()}
    coupled: dict[str, set[int]] = {}
    for axis in [axis for axis in source if kind_of(axis) == HEADS and axis in sizes]:
        head_dim, hidden = near(axis, HEAD_DIM, source), near(axis, HIDDEN, source)
        if axis.split(".")[-2:-1] and axis.split(".")[-2] in MIXERS and head_dim != sibling(axis, HEAD_DIM):
            head_dim = None
        whole = bool(head_dim and hidden and source[axis] * source[head_dim] == source[hidden])
        whole |= bool(hidden and head_dim == sibling(axis, HEAD_DIM) and field_of(config, head_dim) is None)
        if whole and head_dim and hidden and (tight or field_of(config, head_dim) is None):
            if hidden in coupled and axis not in fixed:  # another stack of the same width: other heads
                spare = (12, 10, 20, 4, 5) if table is SIZES[0] else (8, 14, 7, 3, 21, 2)
                others = (n for n in spare if sizes[hidden] % n == 0 and n not in coupled[hidden])
                sizes[axis] = next(others, sizes[axis])
            elif hidden not in fixed:
                sizes[hidden] = sizes[axis] * sizes[head_dim]
            coupled.setdefault(hidden, set()).add(sizes[axis])
            sizes[head_dim] = sizes[hidden] // sizes[axis]
        if tight and not whole and hidden and head_dim:
            _couple_by_factor(axis, head_dim, hidden, source, sizes, {*fixed, *coupled})
            coupled.setdefault(hidden, set()).add(sizes[axis])
        if axis not in same:
            _couple_stages(axis, hidden, source, sizes, fixed, table is SIZES[1])
        groups = sibling(axis, KV_HEADS)
        if groups not in source:
            continue
        own_keys = near(axis, KV_RANK, source) or tight > 1  # latent attention: each head has its own keys
        if field_of(config, groups) is None or (own_keys and source[groups] == source[axis]):
            sizes[groups] = sizes[axis]
        elif sizes[axis] % sizes[groups] and groups not in fixed:
            taken = sizes[sibling(same[axis], KV_HEADS)] if axis in same else 0
            sizes[groups] = max(d for d in range(1, sizes[axis]) if sizes[axis] % d == 0 and d != taken)
    for axis in [axis for axis in source if kind_of(axis) in (EMBEDDING, INNER)]:
        if (hidden := near(axis, HIDDEN, source)) and source[axis] % source[hidden] == 0:
            sizes[axis] = sizes[hidden] * (source[axis] // source[hidden])
    for axis in [axis for axis in source if kind_of(axis) == HEAD_DIM]:
        rope, nope = near(axis, ROPE_DIM, source), near(axis, NOPE_DIM, source)
        if rope and nope and source[axis] == source[rope] + source[nope]:
            sizes[axis] = sizes[rope] + sizes[nope]
        exception = sibling(axis, NOPE_DIM) + ".1"  # of some layers, whose heads are as wide
        if rope and exception in source and source[axis] == source[rope] + source[exception]:
            sizes[axis] = sizes[rope] + sizes[exception]
    for axis in [
        axis for axis in sizes if axis.endswith("index.head_dim")
    ]:  # it rotates as much as the others
        if (own := near(axis.replace("index.", ""), HEAD_DIM, sizes)) and sizes[axis] < sizes[own]:
            sizes[axis] += 32
    for axis in [axis for axis in source if kind_of(axis) == GROUPS and source[axis] > 1]:
        if heads := near(axis, HEADS, sizes):
            sizes[axis] = next(d for d in range(2, sizes[heads] + 1) if sizes[heads] % d == 0)
    return sizes


def _stacks(source: Mapping[str, int]) -> list[str]:
    """The stacks and stages that have sizes of their own; of very many, those with heads first.

    The table has an end, and from there on lengths repeat: heads of two stacks must not be told apart by nothing.
    """
    found = list(dict.fromkeys("".join(axis.rpartition(kind_of(axis))[::2]) for axis in source))
    if len(found) <= len(SIZES[0][HEADS]):
        return found
    headed = {"".join(axis.rpartition(HEADS)[::2]) for axis in source if kind_of(axis) == HEADS}
    return sorted(found, key=lambda stack: stack not in headed)


GROUPED = 3
"""Groups of experts, where a model routes by groups: then experts are no symmetry, and a miniature must show it."""

DOUBLING: tuple[tuple[int, tuple[int, ...]], ...] = ((30, (3, 5, 6, 10, 15, 2)), (42, (6, 7, 14, 3, 21, 2)))
"""For nets whose stages are each twice as wide as the one before: the first width, and divisors of it."""


def _couple_stages(
    heads: str,
    hidden: str | None,
    source: Mapping[str, int],
    sizes: dict[str, int],
    fixed: Mapping[str, int],
    second: bool,
) -> None:
    """Widths that the heads divide where only one of the two has an entry per stage; mends `sizes`."""
    scope, _, stage = heads.rpartition(HEADS)
    if stage and hidden == f"{scope}{HIDDEN}":
        width, divisors = DOUBLING[second]
        sizes |= {
            name: size
            for name, size in ((hidden, width), (heads, divisors[int(stage[1:]) % len(divisors)]))
            if name not in fixed
        }
    elif hidden is None:
        for axis in (f"{scope}{HIDDEN}.{i}" for i in range(10)):
            if axis in source and axis not in fixed:
                sizes[axis] -= sizes[axis] % sizes[heads]


def _couple_by_factor(
    heads: str,
    head_dim: str,
    hidden: str,
    source: Mapping[str, int],
    sizes: dict[str, int],
    fixed: Collection[str],
) -> None:
    """Let heads x head_dim = 2 hidden as in Mamba, or else hidden a multiple of heads at least; mends `sizes`."""
    factor, rest = divmod(source[heads] * source[head_dim], source[hidden])
    if factor < 2 or rest:
        if hidden not in fixed:
            sizes[hidden] -= sizes[hidden] % sizes[heads]
        elif heads not in fixed and sizes[hidden] % sizes[heads]:
            sizes[heads] = next(n for n in (12, 10, 9, 8, 6, 15, 20, 5, 4, 7, 3, 1) if sizes[hidden] % n == 0)
        return
    whole = factor * sizes[hidden]
    if whole % sizes[heads]:
        sizes[heads] = next(n for n in (12, 10, 9, 8, 6, 15, 20, 5, 4, 7, 3, 1) if whole % n == 0)
    sizes[head_dim] = whole // sizes[heads]
