"""The layout language against plain numpy: reshape for a product, concatenate for a sum."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ws import axes
from hf_ws.axes import (
    AXES,
    Block,
    Dim,
    Expression,
    Product,
    Sum,
    coordinates,
    length,
    parse,
    positions,
    spell,
)


def dim(text: str) -> Dim:
    (only,) = parse(text)
    return only


# ------------------------------------------------------------------------------------------------ language

NAMES = st.sampled_from(AXES)
LEAVES = st.one_of(NAMES, st.integers(1, 40), st.builds(Block, NAMES, st.integers(1, 9)))


def _products(children: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.lists(children, min_size=2, max_size=3).map(lambda factors: Product(tuple(factors)))


def _sums(children: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.lists(children, min_size=2, max_size=3).map(lambda parts: Sum(tuple(parts)))


EXPRESSIONS = st.recursive(LEAVES, lambda children: _products(children) | _sums(children), max_leaves=8)
LAYOUTS = st.lists(st.builds(Dim, EXPRESSIONS, st.booleans()), max_size=4).map(tuple)


@given(LAYOUTS)
def test_parse_reads_back_whatever_spell_writes(layout: axes.Layout) -> None:
    assert parse(spell(layout)) == layout


@pytest.mark.parametrize(
    "text",
    [
        "hidden",
        "vocab hidden",
        "(heads head_dim) <hidden",
        "<hidden (3 heads head_dim)",
        "experts (2 moe_ffn) <hidden",
        "(heads head_dim + kv_heads head_dim + kv_heads head_dim) <hidden",
        "(kv_heads (heads head_dim + head_dim + head_dim)) <hidden",
        "(heads:4 3 heads head_dim) <hidden",
        "(2 + positions) hidden",
        "",
    ],
)
def test_every_spelling_of_the_design_comes_back_as_it_was(text: str) -> None:
    assert spell(parse(text)) == text


def test_a_parenthesis_around_one_thing_means_that_thing() -> None:
    assert parse("(hidden) <((ffn))") == parse("hidden <ffn")


def test_spaces_do_not_matter() -> None:
    assert parse(" ( heads   head_dim+kv_heads head_dim )<hidden") == parse(
        "(heads head_dim + kv_heads head_dim) <hidden"
    )


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("hiden", 0),
        ("vocab hiden", 6),
        ("(heads head_dim <hidden", 16),  # `<` marks a dimension, not a factor
        ("(heads head_dim", 15),
        ("(heads +) hidden", 8),
        ("(+ heads) hidden", 1),
        ("()", 1),
        ("vocab <", 7),
        ("vocab )", 6),
        ("vocab * hidden", 6),
        ("Hidden", 0),
        ("heads:", 5),
        ("<< hidden", 1),
    ],
)
def test_a_mistake_is_pointed_at(text: str, column: int) -> None:
    with pytest.raises(ValueError, match="layout not understood") as caught:
        parse(text)
    shown, pointer = str(caught.value).splitlines()[1:]
    assert shown.strip() == text
    assert pointer.index("^") - (len(shown) - len(text)) == column


def test_the_axes_of_a_dimension_come_in_order_and_once() -> None:
    assert dim("(kv_heads (heads head_dim + 2 head_dim + head_dim))").axes == (
        "kv_heads",
        "heads",
        "head_dim",
    )
    assert dim("(heads:4 3 heads head_dim)").axes == ("heads", "head_dim")
    assert dim("16").axes == ()


# ------------------------------------------------------------------------------------------------ numbers

SIZES = {
    "hidden": 30,
    "heads": 12,
    "kv_heads": 3,
    "head_dim": 5,
    "ffn": 14,
    "experts": 2,
    "moe_ffn": 7,
    "positions": 11,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hidden", 30),
        ("16", 16),
        ("(heads head_dim)", 60),
        ("(2 ffn)", 28),
        ("(2 + positions)", 13),
        ("(heads head_dim + kv_heads head_dim + kv_heads head_dim)", 60 + 15 + 15),
        ("(kv_heads (heads head_dim + head_dim + head_dim))", 3 * (4 + 1 + 1) * 5),
        ("(heads:4 3 heads head_dim)", 3 * 60),
        ("(heads head_dim + head_dim + head_dim)", 70),
    ],
)
def test_a_length_is_the_product_and_the_sum_it_spells(text: str, expected: int) -> None:
    assert length(dim(text), SIZES) == expected


def test_blocks_need_a_multiple() -> None:
    with pytest.raises(ValueError, match=r"heads=6 is stored in 4 equal blocks"):
        length(dim("(heads:4 head_dim heads)"), {"heads": 6, "head_dim": 2})


def test_coordinates_of_a_product_are_numpys_indices() -> None:
    found = coordinates(dim("(heads 3 head_dim)"), SIZES)
    head, part, channel = np.indices((12, 3, 5)).reshape(3, -1)
    np.testing.assert_array_equal(found["heads"], head)
    np.testing.assert_array_equal(found["head_dim"], channel)
    constants = [values for name, values in found.items() if name.startswith("#")]
    np.testing.assert_array_equal(constants, [part])


def test_coordinates_are_minus_one_where_a_part_lacks_the_axis() -> None:
    found = coordinates(
        dim("(heads head_dim + kv_heads head_dim)"), {"heads": 2, "kv_heads": 1, "head_dim": 2}
    )
    assert found["heads"].tolist() == [0, 0, 1, 1, -1, -1]
    assert found["kv_heads"].tolist() == [-1, -1, -1, -1, 0, 0]
    assert found["head_dim"].tolist() == [0, 1, 0, 1, 0, 1]


# ------------------------------------------------------------------------------------------------ positions
# The oracle names every source position with a number, cuts that array up with reshape, selects with numpy's
# own indexing, and glues it together again.

TARGET = {"hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "ffn": 6, "positions": 7}
KV = np.array([2, 0])  # of three kv groups of four heads, out of order on purpose
INSIDE = np.array([[3, 1], [0, 2]])
MAPS = {
    "hidden": np.array([29, 0, 7, 7, 3, 11, 5, 1]),
    "kv_heads": KV,
    "heads": (KV[:, None] * 4 + INSIDE).ravel(),
    "head_dim": np.array([4, 1]),
    "ffn": np.array([13, 2, 2, 0, 9, 5]),
    "positions": np.arange(7),
}


def _numbered(*shape: int, start: int = 0) -> np.ndarray:
    return start + np.arange(int(np.prod(shape))).reshape(shape)


def _queries(start: int = 0) -> np.ndarray:
    return _numbered(12, 5, start=start)[MAPS["heads"]][:, MAPS["head_dim"]].ravel()


def _keys(start: int) -> np.ndarray:
    return _numbered(3, 5, start=start)[KV][:, MAPS["head_dim"]].ravel()


def _falcon() -> np.ndarray:
    stored = _numbered(3, 6, 5)  # each kv head: four queries, a key, a value
    groups = [np.concatenate([stored[g, INSIDE[i]], stored[g, 4:]]) for i, g in enumerate(KV)]
    return np.stack(groups)[..., MAPS["head_dim"]].ravel()


def _codegen() -> np.ndarray:
    stored = _numbered(4, 3, 3, 5)  # block, part, head in the block, channel
    heads = MAPS["heads"].reshape(4, 1)  # one head to each block of the target
    return np.stack(
        [stored[h // 3, part, h % 3][MAPS["head_dim"]] for block in heads for part in range(3) for h in block]
    ).ravel()


ORACLES = {
    "hidden": lambda: MAPS["hidden"],
    "16": lambda: np.arange(16),
    "(heads head_dim)": _queries,
    "(kv_heads head_dim)": lambda: _keys(0),
    "(2 ffn)": lambda: _numbered(2, 14)[:, MAPS["ffn"]].ravel(),
    "(ffn 2)": lambda: _numbered(14, 2)[MAPS["ffn"]].ravel(),
    "(3 heads head_dim)": lambda: _numbered(3, 12, 5)[:, MAPS["heads"]][..., MAPS["head_dim"]].ravel(),
    "(heads 3 head_dim)": lambda: _numbered(12, 3, 5)[MAPS["heads"]][..., MAPS["head_dim"]].ravel(),
    "(2 + positions)": lambda: np.arange(9),
    "(heads head_dim + kv_heads head_dim + kv_heads head_dim)": lambda: np.concatenate(
        [_queries(), _keys(60), _keys(75)]
    ),
    "(heads head_dim + head_dim + head_dim)": lambda: np.concatenate(
        [_queries(), 60 + MAPS["head_dim"], 65 + MAPS["head_dim"]]
    ),
    "(kv_heads (heads head_dim + head_dim + head_dim))": _falcon,
    "(heads:4 3 heads head_dim)": _codegen,
}


@pytest.mark.parametrize("text", ORACLES)
def test_positions_are_what_numpy_selects(text: str) -> None:
    np.testing.assert_array_equal(positions(dim(text), SIZES, TARGET, MAPS), ORACLES[text]())


@given(st.data())
def test_positions_of_any_product_are_what_numpy_selects(data: st.DataObject) -> None:
    names = data.draw(st.permutations(["hidden", "ffn", "experts", "vocab"]))[: data.draw(st.integers(1, 4))]
    source = {name: data.draw(st.integers(1, 5)) for name in names}
    maps = {
        n: np.array(data.draw(st.lists(st.integers(0, source[n] - 1), min_size=1, max_size=6))) for n in names
    }
    target = {name: len(index) for name, index in maps.items()}
    expected = _numbered(*source.values())[np.ix_(*maps.values())].ravel()
    np.testing.assert_array_equal(positions(dim(f"({' '.join(names)})"), source, target, maps), expected)


@given(st.data())
def test_positions_of_any_sum_are_what_numpy_selects(data: st.DataObject) -> None:
    parts = data.draw(
        st.lists(st.sampled_from(["hidden", "ffn", "(2 ffn)", "(ffn hidden)", "3"]), min_size=2, max_size=4)
    )
    source = {"hidden": 5, "ffn": 3}
    maps = {
        n: np.array(data.draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=6)))
        for n, k in source.items()
    }
    target = {name: len(index) for name, index in maps.items()}
    whole, start = [], 0
    for part in parts:
        stored = {
            "hidden": _numbered(5),
            "ffn": _numbered(3),
            "(2 ffn)": _numbered(2, 3),
            "(ffn hidden)": _numbered(3, 5),
            "3": _numbered(3),
        }[part]
        chosen = {
            "hidden": lambda a: a[maps["hidden"]],
            "ffn": lambda a: a[maps["ffn"]],
            "(2 ffn)": lambda a: a[:, maps["ffn"]],
            "(ffn hidden)": lambda a: a[np.ix_(maps["ffn"], maps["hidden"])],
            "3": lambda a: a,
        }[part](stored)
        whole.append(start + chosen.ravel())
        start += stored.size
    found = positions(dim(f"({' + '.join(parts)})"), source, target, maps)
    np.testing.assert_array_equal(found, np.concatenate(whole))


def test_an_axis_without_a_map_keeps_its_first_indices() -> None:
    found = positions(dim("(heads head_dim)"), {"heads": 3, "head_dim": 4}, {"heads": 2, "head_dim": 3}, {})
    np.testing.assert_array_equal(found, _numbered(3, 4)[:2, :3].ravel())


@pytest.mark.parametrize("text", [*ORACLES])
def test_equal_sizes_without_maps_keep_every_position(text: str) -> None:
    found = positions(dim(text), SIZES, SIZES, {})
    np.testing.assert_array_equal(found, np.arange(length(dim(text), SIZES)))


def test_a_query_head_of_another_group_is_not_there() -> None:
    # Target group 0 comes from source group 1, its query head from source group 0: Falcon stores no such pair.
    maps = {"kv_heads": np.array([1]), "heads": np.array([0])}
    with pytest.raises(
        ValueError, match=r"\(kv_heads \(heads head_dim \+ head_dim\)\): the maps ask for positions"
    ):
        positions(
            dim("(kv_heads (heads head_dim + head_dim))"),
            {"kv_heads": 2, "heads": 4, "head_dim": 1},
            {"kv_heads": 1, "heads": 1, "head_dim": 1},
            maps,
        )


def test_an_axis_that_grows_without_a_map_is_not_there() -> None:
    with pytest.raises(
        ValueError, match=r"\(2 ffn\): the maps ask for positions that the source does not have"
    ):
        positions(dim("(2 ffn)"), {"ffn": 3}, {"ffn": 4}, {})
    with pytest.raises(ValueError, match=r"ffn: the maps ask for positions that the source does not have"):
        positions(dim("ffn"), {"ffn": 3}, {"ffn": 4}, {})


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(axes, raise_on_error=True).attempted > 0
