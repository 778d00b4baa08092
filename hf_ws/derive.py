"""The config of another size: what was asked for, and what follows from it.

>>> from transformers import GPT2Config
>>> large = GPT2Config(n_embd=1280, n_head=20, n_layer=36)
>>> derive_config(large, hidden=512).n_head          # head_dim stays 64
8
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig as Config

from hf_ws.axes import (
    AXES,
    EMBEDDING,
    EXPERTS,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LABELS,
    LAYERS,
    MOE_FFN,
    SHARED_FFN,
    VOCAB,
    kind_of,
    sibling,
)
from hf_ws.errors import PlanError, SizeError
from hf_ws.limits import limits
from hf_ws.sizes import DERIVED, MIXERS, PARTS, field_of, near, nodes, places, regrouped, resize, sizes_of

Kept = Mapping[str, Sequence[int]] | Sequence[int]
"""The source layer of each target layer: by layer axis, or of the one stack there is."""


def derive_config(
    config: Config,
    *,
    hidden: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn: int | None = None,
    vocab: int | None = None,
    experts: int | None = None,
    kept: Kept | None = None,
    **config_fields: Any,
) -> Config:
    """The config of another size: what is asked for, and what follows from it.

    `head_dim` stays, so `heads` follows `hidden`. The ratio of query heads to key/value heads stays, or becomes the
    nearest legal one that gives no key/value head more query heads than it had. The ratio of `ffn` to `hidden` stays,
    rounded to a multiple of 64 (or of what the source's own is a multiple of, if that is less). Lists with one entry
    per layer follow the kept layers. In an encoder-decoder, what both have (`layers`, `heads`, `ffn`) is set in both.

    Args:
        config: The source's config; not changed.
        hidden: Width of the residual stream.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Channels in a head.
        ffn: Neurons of a feed-forward block.
        vocab: Rows of the token embedding.
        experts: Routed experts in a layer.
        kept: The source layer of each target layer, or these by layer axis; the first `layers` if not given.
        config_fields: Any field of the config class in its own spelling, one of a sub-config after its name and a
            dot (`**{"vision_config.hidden_size": 384}`). One that names a size means the same as ours.

    Raises:
        SizeError: no legal target has these sizes; lists every violation and the nearest legal values.
        PlanError: a field that the class does not have, or a size that was given twice.
    """
    sizes = {
        HIDDEN: hidden,
        LAYERS: layers,
        HEADS: heads,
        KV_HEADS: kv_heads,
        HEAD_DIM: head_dim,
        FFN: ffn,
        VOCAB: vocab,
        EXPERTS: experts,
    }
    asked, fields = read_request(
        config, {axis: size for axis, size in sizes.items() if size is not None}, config_fields
    )
    stacks = {} if kept is None else dict(kept) if isinstance(kept, Mapping) else {LAYERS: kept}
    _check_kept(config, stacks, asked)
    problems, derived = attempt(config, asked, stacks, fields)
    if derived is None:
        named = {axis: asked[axis] for axis in asked if _names(problems, config, axis)}
        raise SizeError("; ".join([*problems, *_hints(config, asked, named, stacks, fields)]))
    return derived


def _check_kept(config: Config, kept: Mapping[str, Sequence[int]], asked: dict[str, int]) -> None:
    """Refuse kept layers that there are none of, or not as many as were asked for; adds their number to `asked`."""
    depths = sizes_of(config)
    for axis, own in kept.items():
        if axis not in depths:
            raise SizeError(f"{type(config).__name__} has no {axis}; it has {', '.join(depths)}")
        if asked.setdefault(axis, len(own)) != len(own):
            raise SizeError(f"{axis}={asked[axis]}, but {len(own)} layers are kept: {list(own)}")
        depth = depths[axis]
        outside = [i for i in own if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth]
        if outside or not own:
            raise SizeError(f"kept layers {list(own)}: allowed are 0 to {depth - 1}, at least one")


def read_request(
    config: Config, asked: Mapping[str, int], fields: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, Any]]:
    """What was asked for, as sizes by axis and other fields in the class's own spelling. Raises as `derive_config`."""
    own = sizes_of(config)
    sizes: dict[str, int] = {}
    for axis, size in asked.items():
        parts = [f"{part}.{axis}" for part in PARTS if axis not in own and f"{part}.{axis}" in own]
        sizes |= dict.fromkeys(parts or [axis], size)
    rest: dict[str, Any] = {}
    spelled = _spellings(config)
    for name, value in fields.items():
        if name in ("id2label", "label2id") and value:
            pairs = value.items() if name == "id2label" else ((i, label) for label, i in value.items())
            names = {int(i): label for i, label in pairs}
            rest |= {"id2label": names, "label2id": {label: i for i, label in names.items()}}
            if sizes.setdefault(LABELS, len(names)) != len(names):
                raise PlanError(f"labels is given twice: {sizes[LABELS]}, and {len(names)} in {name}")
        elif isinstance(spelled.get(name), list):
            rest |= _staged(name, value, spelled[name], sizes)
        elif isinstance(own_axis := spelled.get(name), str):
            length = None if value is None else _in_units(config, own_axis, name, value)
            if length is not None and sizes.setdefault(own_axis, length) != length:
                raise PlanError(f"{own_axis} is given twice: {own_axis}={sizes[own_axis]} and {name}={value}")
        elif name in spelled:
            rest[_own_name(config, name)] = value
        else:
            near_by = difflib.get_close_matches(name, [*AXES, *spelled], n=1)
            hint = f"; did you mean {near_by[0]!r}?" if near_by else f"; its sizes are {', '.join(own)}"
            raise PlanError(f"{type(config).__name__} has no field {name!r}{hint}")
    return sizes, rest


def _in_units(config: Config, axis: str, name: str, value: int) -> int:
    """A field's value as the length of its axis, which may stand there several times."""
    if name == axis:
        return value
    own = _own_name(config, name).rpartition(".")[2]
    times = next((place.times for place in places(config).get(axis, ()) if place.field == own), 1)
    if value % times:
        raise PlanError(f"{name}={value} is no multiple of {times}: {type(config).__name__} stores {axis} so")
    return value // times


def _spellings(config: Config) -> dict[str, Any]:
    """Every name that a request may use: the axis it means, the axes of its stages, or None for any other field."""
    spelled: dict[str, Any] = {}
    for path, node in nodes(config):
        before = "".join(f"{name}." for name in path)
        spelled |= {f"{before}{name}": None for name in (*node.to_dict(), *node.attribute_map)}
    for axis, own in places(config).items():
        for place in own:
            name = ".".join((*place.path, place.field))
            if place.index is None:
                spelled[name] = axis
            else:
                spelled[name] = [*(spelled.get(name) or []), axis]
    for path, node in nodes(config):
        before = "".join(f"{name}." for name in path)
        for alias, name in node.attribute_map.items():
            if spelled.get(f"{before}{name}") is not None:
                spelled[f"{before}{alias}"] = spelled[f"{before}{name}"]
    return spelled | {axis: axis for axis in sizes_of(config)} | {LABELS: LABELS}


def _own_name(config: Config, name: str) -> str:
    """A field's name as the class keeps it, whatever alias was used."""
    *path, last = name.split(".")
    node = config
    for part in path:
        node = getattr(node, part)
    return ".".join((*path, node.attribute_map.get(last, last)))


def _staged(name: str, value: Any, axes: list[str], sizes: dict[str, int]) -> dict[str, Any]:
    """A list with one size per stage, as sizes of the stages' axes."""
    if not isinstance(value, list | tuple) or len(value) != len(axes):
        raise PlanError(f"{name}={value!r}: wanted are {len(axes)} whole numbers, one for each stage")
    for axis, size in zip(axes, value, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise PlanError(f"{axis} is given twice: {axis}={sizes[axis]} and {name}={value}")
    return {}


def attempt(
    config: Config,
    asked: Mapping[str, int],
    kept: Mapping[str, Sequence[int]],
    fields: Mapping[str, Any],
) -> tuple[list[str], Config | None]:
    """The derived config, or why there is none."""
    source = sizes_of(config)
    problems = list(_malformed(config, source, asked))
    if problems:
        return problems, None
    target = _follow(config, source, asked)
    for axis in [axis for axis in source if kind_of(axis) == HEADS]:
        problems += _violations(config, axis, source, target, asked, fields)
    problems += limits(config, target, asked, fields)
    if problems:
        return list(dict.fromkeys(problems)), None
    changed = {axis: size for axis, size in target.items() if size != source[axis] or axis in asked}
    for axis in list(changed):
        if kind_of(axis) == HEADS:  # where the field may be empty (Mixtral), it would follow hidden / heads
            head_dim = near(axis, HEAD_DIM, target)
            changed |= {head_dim: target[head_dim]} if head_dim else {}
    stacks = dict(kept)
    for axis in (axis for axis in source if kind_of(axis) == LAYERS):
        if axis not in stacks and target[axis] != source[axis]:
            stacks[axis] = [min(i, source[axis] - 1) for i in range(target[axis])]
    try:
        derived = resize(config, changed, stacks, **fields)
    except Exception as error:  # a config class may raise anything; whatever it is, it refused these sizes
        return [f"{type(config).__name__} refuses these sizes: {_innermost(error)}"], None
    wrong = {
        axis: size
        for axis, size in sizes_of(derived).items()
        if size != target.get(axis, size) and (axis in asked or field_of(config, axis) is not None)
    }
    return [
        f"{axis} cannot be {target[axis]} here: it follows the other sizes and is {size}"
        for axis, size in wrong.items()
    ], (None if wrong else derived)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".")


def _malformed(config: Config, source: Mapping[str, int], asked: Mapping[str, int]) -> Iterator[str]:
    for axis, size in asked.items():
        if axis not in source:
            yield f"{axis}={size}: {type(config).__name__} has no {axis}; it has {', '.join(source)}"
        elif isinstance(size, bool) or not isinstance(size, int):
            yield f"{axis}={size!r} is not a whole number"
        elif not 1 <= size < 2**31:
            yield f"{axis}={size} is out of range: allowed are 1 to {2**31 - 1}"


def _follow(config: Config, source: Mapping[str, int], asked: Mapping[str, int]) -> dict[str, int]:
    """Every size of the target: what was asked for, the rest by the rules of `derive_config`."""
    target = dict(source) | dict(asked)
    same = regrouped(config)
    for heads in (axis for axis in source if kind_of(axis) == HEADS):
        if heads in same:
            target[heads] = target[same[heads]]
        _follow_heads(config, heads, source, asked, target)
    for axis in source:
        hidden = near(axis, HIDDEN, source)
        if hidden is None or axis in asked or hidden not in asked:
            continue
        if kind_of(axis) in (FFN, MOE_FFN, SHARED_FFN):
            unit = math.gcd(64, source[axis])
            wanted = source[axis] * target[hidden] / source[hidden]
            target[axis] = max(unit, unit * round(wanted / unit))
        elif kind_of(axis) == EMBEDDING and source[axis] == source[hidden]:
            target[axis] = target[hidden]
    for axis in DERIVED.get(config.model_type, {}):
        if axis == FFN and axis not in asked:
            target[axis] = source[axis] * target[HIDDEN] // source[HIDDEN]
    return target


def _follow_heads(
    config: Config,
    heads: str,
    source: Mapping[str, int],
    asked: Mapping[str, int],
    target: dict[str, int],
) -> None:
    """The heads of one stack, and what goes with them, in place."""
    hidden, head_dim, kv_heads = (
        near(heads, HIDDEN, source),
        near(heads, HEAD_DIM, source),
        sibling(heads, KV_HEADS),
    )
    if hidden and head_dim and heads not in asked and hidden in asked and field_of(config, heads):
        if source[heads] * source[head_dim] == source[hidden]:
            target[heads] = target[hidden] // target[head_dim]
        else:
            target[heads] = max(1, round(source[heads] * target[hidden] / source[hidden]))
    if hidden and head_dim and head_dim not in asked and _fills(config, head_dim) and target[heads]:
        target[head_dim] = target[hidden] // target[heads]
        if heads not in asked and field_of(config, heads):
            target[head_dim] = source[head_dim]
    if kv_heads in source and kv_heads not in asked and target[heads]:
        width = source[heads] / source[kv_heads]  # wider groups no selection of whole heads could give
        target[kv_heads] = min(d for d in _divisors(target[heads]) if target[heads] <= d * width)


def _fills(config: Config, head_dim: str) -> bool:
    """Whether heads are as wide as it takes to fill hidden; those of a mixer without a field are not known to."""
    return field_of(config, head_dim) is None and head_dim.split(".")[0] not in MIXERS


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _violations(
    config: Config,
    heads_axis: str,
    source: Mapping[str, int],
    target: Mapping[str, int],
    asked: Mapping[str, int],
    fields: Mapping[str, Any],
) -> Iterator[str]:
    """What is wrong with one stack's heads."""
    hidden_axis, dim_axis = near(heads_axis, HIDDEN, source), near(heads_axis, HEAD_DIM, source)
    kv_axis = sibling(heads_axis, KV_HEADS)
    heads, kv_heads = target[heads_axis], target[kv_axis]
    if hidden_axis and dim_axis:
        hidden, head_dim = target[hidden_axis], target[dim_axis]
        coupled = _fills(config, dim_axis)
        whole = source[heads_axis] * source[dim_axis] == source[hidden_axis]
        followed = whole and hidden_axis in asked and heads_axis not in asked
        if heads < 1 or ((coupled or followed) and whole and hidden != heads * head_dim):
            yield f"{hidden_axis}={hidden} is not a whole number of {heads_axis} of {head_dim} channels"
        elif heads % kv_heads:
            yield f"{heads_axis}={heads} is no multiple of {kv_axis}={kv_heads}"
        node = places(config)[heads_axis][0].path if heads_axis in places(config) else ()
        owner = dict(nodes(config))[node]
        if head_dim % 2 and head_dim != source[dim_axis] and hasattr(owner, "rope_parameters"):
            yield f"{dim_axis}={head_dim} is odd, and rotary positions turn pairs of channels"
        if head_dim != source[dim_axis] and "short_factor" in str(getattr(owner, "rope_parameters", None)):
            yield f"{dim_axis}={head_dim}: longrope has a factor for each rotary pair of {source[dim_axis]} channels"
        rotary_dim = fields.get("rotary_dim", getattr(owner, "rotary_dim", None))
        if isinstance(rotary_dim, int) and rotary_dim > head_dim:
            yield f"head_dim={head_dim} is less than rotary_dim={rotary_dim}; give rotary_dim= as well"
    elif heads % kv_heads:
        yield f"{heads_axis}={heads} is no multiple of {kv_axis}={kv_heads}"


def _names(problems: Sequence[str], config: Config, axis: str) -> bool:
    """Whether what is wrong speaks of this size, by our name for it or the class's: any other need not be tried."""
    text = " ".join(problems).replace("_", " ").lower()
    return any(name.replace("_", " ") in text for name in (axis, field_of(config, axis) or axis))


def _hints(
    config: Config,
    asked: Mapping[str, int],
    doubtful: Mapping[str, int],
    kept: Mapping[str, Sequence[int]],
    fields: Mapping[str, Any],
) -> Iterator[str]:
    """For each doubtful size that alone can mend the request, its nearest legal values."""
    reach = 512 // max(1, len(doubtful))  # a thousand tries in all take seconds
    for axis, size in doubtful.items():
        if isinstance(size, bool) or not isinstance(size, int) or kind_of(axis) == LAYERS:
            continue
        smaller, larger = (
            range(min(size, 2**20) - 1, max(0, size - reach - 1), -1),
            range(max(size, 0) + 1, size + reach + 1),
        )
        legal = []
        for candidates in (smaller, larger):
            for candidate in candidates:
                if attempt(config, {**asked, axis: candidate}, kept, fields)[1] is not None:
                    legal.append(candidate)
                    break
        if legal:
            yield f"nearest legal: {axis}={' or '.join(map(str, legal))}"
