"""What a dimension of a given length may be: the products and sums of axes that fit both miniatures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import permutations, product

from transformers import PreTrainedConfig

from hf_ws.axes import (
    EMBEDDING,
    EXPERTS,
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    KV_RANK,
    LABELS,
    LAYERS,
    MOE_FFN,
    NOPE_DIM,
    POSITIONS,
    Q_RANK,
    RANK,
    ROPE_DIM,
    STATE,
    UNIT,
    V_DIM,
    VOCAB,
    WAVES,
    kind_of,
    length,
    parse,
    sibling,
)
from hf_ws.fields import DERIVED, HEADED, MIXERS, PARTS, SINES, STREAMS
from hf_ws.sizes import field_of, near, nodes, scope_of, sizes_of

SUMS = (
    "(heads head_dim + kv_heads head_dim + kv_heads head_dim)",
    "(heads head_dim + head_dim + head_dim)",
    "(heads head_dim + head_dim)",
    "(2 heads head_dim + 2 kv_heads head_dim)",
    "(rank + state + state)",
    "(kv_rank + rope_dim)",
    "(nope_dim + rope_dim)",
    "(heads (nope_dim + rope_dim))",
    "(heads (nope_dim + v_dim))",
    "(heads (nope_dim + rope_dim + v_dim))",
    "(heads nope_dim + heads rope_dim)",
    "(heads head_dim + kv_heads state + kv_heads state)",
    "(heads head_dim + heads head_dim + kv_heads state + kv_heads state + heads)",
    "(kv_heads head_dim + kv_heads head_dim + heads v_dim)",
    "(kv_heads (head_dim + head_dim + heads v_dim + heads v_dim))",
    "(kv_heads (heads + heads))",
)
"""What is stored end to end in one tensor, in every stack that has these axes; products need no such list."""

ACROSS = (
    "(hidden + shape.embedding + pronunciation.embedding)",
    "(embedding + head.hidden)",
    "(4 coordinate.embedding + 2 shape.embedding)",
    "(axial.embedding.0 + axial.embedding.1)",
    "(2 (axial.embedding.0 + axial.embedding.1))",
    "(2 audio_config.waves 2 + audio_config.still.hidden)",
)
"""The same with axes of several stacks, each by its full name."""

MORE = 50
"""How many rows a table may have after one for each token, or a router after one for each expert, in a miniature."""


ATTENTION = re.compile(r"attn|attention|recurrentblock")
"""What an attention's module is called, or one in its place whose state is in heads."""


class Explain:
    """The products and sums of axes that have a given length in both miniatures."""

    def __init__(
        self,
        small: PreTrainedConfig,
        other: PreTrainedConfig,
        each: Mapping[tuple[str, int], str] | None = None,
    ) -> None:
        self._each = {place: (axis, sizes_of(small)[axis]) for place, axis in (each or {}).items()}
        """For what tensor, and in which dimension, there is as much for each layer: the axis, and how many."""
        sizes, others = visible_sizes(small), visible_sizes(other)
        self._terms: list[tuple[str, int, int]] = []
        """Factors side by side, as in a parenthesis, with their length in each miniature."""
        self._sums: list[tuple[str, int, int]] = []
        self._whole = {text: parse(text)[0].axes for text in joined(small).values()}
        """The streams that consist of several axes end to end, and these axes."""
        self._mixers = {scope for axis in sizes if (scope := axis.partition(".")[0]) in MIXERS}
        for axis in sizes:
            if kind_of(axis) not in (LAYERS, WAVES) and axis in others:
                self._terms.append((axis, sizes[axis], others[axis]))
        for experts in (axis for axis in sizes if kind_of(axis) == EXPERTS):
            inside = {near(experts, kind, sizes) or "" for kind in (FFN, MOE_FFN)}
            for ffn in sorted(inside & others.keys()):
                text = f"{experts} {ffn}"
                self._terms.append((text, sizes[experts] * sizes[ffn], others[experts] * others[ffn]))
        self._sines = list(_sines(small))
        for heads in (axis for axis in sizes if kind_of(axis) == HEADS):
            names = {kind: near(heads, kind, sizes) for kind in SCOPED}
            names[HEADS] = heads
            pairs = [
                (own, inner)
                for own in (heads, names[KV_HEADS])
                for inner in (HEAD_DIM, V_DIM, NOPE_DIM, ROPE_DIM, STATE)
            ]
            for own, inner in pairs:
                if own and (head_dim := names.get(inner)) in others:
                    self._terms.append(
                        (f"{own} {head_dim}", sizes[own] * sizes[head_dim], others[own] * others[head_dim])
                    )
            for inner in (axis for axis in sizes if kind_of(axis) == HEAD_DIM and axis in others):
                if (
                    sibling(inner, HEADS) not in sizes and near(inner, HEADS, sizes) == heads
                ):  # as many, but narrower
                    text = f"{heads} {inner}"
                    self._terms.append((text, sizes[heads] * sizes[inner], others[heads] * others[inner]))
            for own, inner in product(
                _of_layers(heads, (HEADS, KV_HEADS), sizes), _of_layers(heads, (HEAD_DIM, V_DIM), sizes)
            ):
                self._terms.append((f"{own} {inner}", sizes[own] * sizes[inner], others[own] * others[inner]))
            self._add_sums(names, sizes, others)
        for rank in (axis for axis in sizes if kind_of(axis) == RANK):
            names = {kind: near(rank, kind, sizes) for kind in SCOPED if kind != KV_HEADS}
            self._add_sums(names | {RANK: rank}, sizes, others)
        for text in ACROSS:
            if {*parse(text)[0].axes} <= sizes.keys() & others.keys():
                self._sums.append((text, length(parse(text)[0], sizes), length(parse(text)[0], others)))

    def _add_sums(
        self, names: Mapping[str, str | None], sizes: Mapping[str, int], others: Mapping[str, int]
    ) -> None:
        """What one stack, whose axes have these names, may store end to end."""
        for text in SUMS:
            if (spelled := _scoped(text, names)) is not None:
                dim = parse(spelled)[0]
                try:
                    self._sums.append((spelled, length(dim, sizes), length(dim, others)))
                except ValueError:  # heads that are no multiple of these groups are not grouped
                    continue

    def __call__(
        self, size: int, other: int | None, inner: bool, reads: bool, name: str, at: int = -1
    ) -> tuple[str, ...]:
        """The explanations of a tensor's dimension, the most likely first."""
        axis, depth = self._each.get((name, at), ("", 1))
        found = self._explained(size // depth, None if other is None else other // depth, inner, reads, name)
        if not axis:
            return found
        return tuple(axis if rest == "1" else f"({axis} {rest})" for rest in found)

    def _explained(
        self, size: int, other: int | None, inner: bool, reads: bool, name: str
    ) -> tuple[str, ...]:
        if other is None or size == other:
            return (str(size),)
        found: dict[str, tuple[int, ...]] = {}
        for waves, end, sines, read in self._sines:
            if size == waves and not inner and name.endswith(end) and reads == read:
                return (sines,)
        for text, here, there in self._terms:
            factors = text.split()
            number, rest = divmod(size, here)
            if not rest and number * there == other:
                own = [*([str(number)] if number > 1 else []), *factors]
                spellings = {_product(p) for p in permutations(own)}
                # so many channels of each head, rather than q, k, v
                wide = kind_of(text) == GROUPS or (number > 3 and kind_of(text) in (HEADS, KV_HEADS))
                likely = _product(sorted(own, key=str.isdigit) if wide else own)
                for spelled in sorted(spellings):
                    found[spelled] = self._rank(text, number, spelled != likely, inner, name)
        for spelled, here, there in self._sums:
            if (size, other) == (here, there):
                whole = parse(spelled)[0].axes in self._whole.values()
                rank = self._rank(HIDDEN if whole else spelled, 1, False, inner, name)
                found.setdefault(spelled, rank if whole else (2, *rank[1:]))
        for axis, here, there in self._terms:
            if kind_of(axis) == POSITIONS and 0 < size - here == other - there <= 8:
                found.setdefault(f"({size - here} + {axis})", (0, 3, 0, 0))
            elif (
                not found
                and kind_of(axis) in (VOCAB, EXPERTS, LABELS)
                and 0 < size - here == other - there <= MORE
            ):
                found[f"({axis} + {size - here})"] = (0, 3, 0, 0)
        for axis, here, there in (
            self._terms if not found else ()
        ):  # FocalNet: a few gates behind two copies of the stream
            number = (size - other) // (here - there) if here != there else 0
            rest = size - number * here
            if (
                kind_of(axis) == HIDDEN
                and " " not in axis
                and number > 1
                and 0 < rest == other - number * there <= 8
            ):
                for spelled in (f"({number} {axis} + {rest})", f"({rest} + {number} {axis})"):
                    found[spelled] = self._rank(axis, number, spelled[1] == str(rest), inner, name)
        if not found:
            found = dict(self._gathered(size, other, name))
        for axis, here, there in self._terms if not found else ():
            if kind_of(axis) == HIDDEN and " " not in axis and 0 < size - here == other - there:
                rest, before = size - here, self._rank(axis, 1, True, inner, name)
                found[f"({axis} + {rest})"] = self._rank(
                    axis, 1, False, inner, name
                )  # and what any model has beside
                found[f"({rest} + {axis})"] = before
        return tuple(sorted(found, key=lambda text: (found[text], text)))

    def _gathered(self, size: int, other: int, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """A stream and all that the layers of a block made of it, end to end (HGNet)."""
        streams = [term for term in self._terms if kind_of(term[0]) in (HIDDEN, EMBEDDING)]
        inner = [term for term in self._terms if kind_of(term[0]) == FFN]
        for (hidden, here, there), (ffn, one, another) in product(streams, inner):
            number, rest = divmod(size - here, one)
            if number > 0 and not rest and other - there == number * another:
                yield f"({hidden} + {number} {ffn})", self._rank(ffn, number, False, False, name)

    def _rank(self, text: str, number: int, odd_order: bool, inner: bool, name: str) -> tuple[int, ...]:
        pair = " " in text
        stack = text.partition(" ")[0].rpartition(kind_of(text.partition(" ")[0]))[0].rstrip(".")
        parts = ([part] if part in PARTS else part.split("_") for part in stack.split("."))
        words = [word for own in parts for word in own if word not in ("config", "")]
        words += ["video"] if "vision" in words else []
        elsewhere = bool(words) and not any(word in name for word in words)
        elsewhere |= pair and not words and not self._mixers.isdisjoint(name.split("."))
        unlikely = int(pair != inner and (pair or kind_of(text) in (HIDDEN, UNIT)))
        unlikely += int(kind_of(text) == HIDDEN and number > 1)
        unlikely += int(
            pair and not inner and (ATTENTION.search(name) is not None or "layernorm" in name)
        )  # rather two streams, end to end
        unlikely += 2 * int(not pair and kind_of(text) in (HEADS, KV_HEADS, HEAD_DIM, EXPERTS) and number > 1)
        unlikely += 2 * int(kind_of(text) == V_DIM and not inner and number > 1)
        stage = text.rpartition(".")[2]
        unlikely += int(pair and not inner and stage.isdigit())  # other stages' heads fit any power of two
        off = int(stage.isdigit() and stage not in name.split("."))
        named = inner and bool(words) and not elsewhere  # heads are those of the stack that the name tells
        return (unlikely, int(elsewhere), int(odd_order), int(not named), number, int(pair != inner), off)


def joined(config: PreTrainedConfig) -> dict[str, str]:
    """The streams that consist of several axes end to end, as they are spelled."""
    spelled = {parse(text)[0].axes: text for text in reversed(ACROSS)}
    return {hidden: spelled[parts] for hidden, parts in streams(config).items() if parts in spelled}


def _sines(config: PreTrainedConfig) -> Iterator[tuple[int, str, str, bool]]:
    """How the waves that a parameter reads lie, by their number and the end of its name; and whether they are read."""
    sizes = sizes_of(config)
    for path, node in nodes(config):
        scope = scope_of(config, path)
        for end, text in SINES.get(node.model_type, ()):
            own = text.lstrip("<").replace(WAVES, f"{scope}{WAVES}")
            yield length(parse(own)[0], sizes), end, own, text.startswith("<")


SCOPED = (HIDDEN, KV_HEADS, HEAD_DIM, RANK, Q_RANK, KV_RANK, ROPE_DIM, NOPE_DIM, V_DIM, STATE)


def _scoped(text: str, names: Mapping[str, str | None]) -> str | None:
    """A spelling with each kind replaced by the axis of one stack; None if that has not all of them."""
    kinds = set(re.findall(r"[a-z_]+", text))
    if not all(names.get(kind) for kind in kinds):
        return None
    return re.sub(r"[a-z_]+", lambda match: str(names[match.group()]), text)


def _of_layers(heads: str, kinds: tuple[str, ...], sizes: Mapping[str, int]) -> list[str]:
    """The axes of these kinds in a stack, those that only some of its layers have (`head_dim.1`) included."""
    if heads[-1].isdigit() or not any(
        f"{sibling(heads, kind)}.1" in sizes for kind in (HEADS, KV_HEADS, HEAD_DIM, V_DIM)
    ):
        return []
    return [
        axis
        for kind in kinds
        for axis in sizes
        if axis.rstrip("0123456789").rstrip(".") == sibling(heads, kind)
    ]


def _product(factors: tuple[str, ...] | list[str]) -> str:
    return factors[0] if len(factors) == 1 else f"({' '.join(factors)})"


def visible_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The sizes that can show in a parameter: not those that merely repeat another (`kv_heads` in GPT-2)."""
    sizes = sizes_of(config)
    derived = DERIVED.get(config.model_type, {})
    for axis in list(sizes):
        if (kind_of(axis) == KV_HEADS and field_of(config, axis) is None and axis not in derived) or (
            kind_of(axis) == EMBEDDING and sizes.get(near(axis, HIDDEN, sizes) or "") == sizes[axis]
        ):
            del sizes[axis]
    for hidden in streams(config):
        sizes.pop(hidden, None)
    return sizes


def streams(config: PreTrainedConfig) -> dict[str, tuple[str, ...]]:
    """Streams whose channels are not free, as the axes that they consist of."""
    found: dict[str, tuple[str, ...]] = {
        sibling(axis, HIDDEN): (axis,) for axis in sizes_of(config) if kind_of(axis) in (UNIT, GROUPS)
    }
    for path, node in nodes(config):
        scope = scope_of(config, path)
        if node.model_type in HEADED:
            scope = scope_of(config, path)
            found[f"{scope}{HIDDEN}"] = (f"{scope}{HEADS}", f"{scope}{HEAD_DIM}")
        for axis, parts in STREAMS.get(node.model_type, {}).items():
            found[f"{scope}{axis}"] = tuple(f"{scope}{part}" for part in parts)
    return found
