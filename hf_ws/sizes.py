"""The sizes of a config's axes: where each stands in the config, what it is, and the config with others.

    >>> from transformers import GPT2Config
    >>> sizes_of(GPT2Config(n_embd=1280, n_head=20, n_layer=36))["ffn"]
    5120

A config class spells its sizes its own way (`hidden_size`, `n_embd`, `d_model`, `dim`); `hf_ws.fields` is the whole
dictionary. A config of several parts is a tree: the sizes of the text part, and of what belongs to the whole, go by
plain names (`hidden`), those of any other part by its name as well (`vision_config.hidden`, `decoder.heads`), and a
list with one entry per stage gives an axis per stage (`hidden.0`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields as declared
from dataclasses import replace
from functools import cache, partial
from typing import Any

from transformers import PreTrainedConfig as Config

from hf_ws.axes import (
    AXES,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LABELS,
    LAYERS,
    kind_of,
    sibling,
)
from hf_ws.fields import (
    BY_MODALITY,
    DERIVED,
    FIELDS,
    HALVES,
    MIXERS,
    MULTIPLES,
    PARTS,
    SIZE_FIELDS,
    fields_for,
)
from hf_ws.followers import FOLLOWERS, Whole
from hf_ws.perlayer import follow_layers
from hf_ws.spot import Place, exceptions_of, node_at


def nodes(config: Config, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Config]]:
    """Every config of the tree with the names of the sub-configs on the way, the whole first."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, Config):
            yield from nodes(value, (*path, name))


def main_path(config: Config) -> tuple[str, ...]:
    """The way to the part whose sizes go by plain names: the text part, or the whole where that has a width itself."""
    for path, text in nodes(config):
        if path and path[-1] == "text_config":
            own, its = (
                next((vars(c)[n] for n in FIELDS[HIDDEN] if n in vars(c)), None) for c in (config, text)
            )
            repeats = any((config.model_type, name) in FOLLOWERS for name in FIELDS[HIDDEN])
            return path if repeats or own in (None, its) else ()
    return ()


def scope_of(config: Config, path: tuple[str, ...]) -> str:
    """What the sizes of one config of the tree are called by: nothing for the text part's, and what belongs to it."""
    own = path[:-1] if path and path[-1] in HALVES else path
    return "" if own == main_path(config)[: len(own)] else "".join(f"{name}." for name in own)


def _following(config: Config) -> dict[tuple[str, ...], Callable[[dict[str, Any]], Any]]:
    """The way to each field that follows others, and what it is by the dict of the whole config."""
    ways: dict[tuple[str, ...], Callable[[dict[str, Any]], Any]] = {}
    for path, node in nodes(config):
        family = None if getattr(node, "new_decoder_architecture", False) else node.model_type
        for (model_type, name), leader in FOLLOWERS.items():
            if family == model_type:
                way = (*path, *name.split("."))
                ways[way] = partial(_led, leader, path, way[:-1])
    return ways


def _led(leader: Any, family: Sequence[str], part: Sequence[str], values: dict[str, Any]) -> Any:
    """What a field follows: another field of its family's config, or a function of that dict or of its own part."""
    if isinstance(leader, str):
        return node_at(values, (*family, *leader.split(".")))
    return leader.of(node_at(values, family)) if isinstance(leader, Whole) else leader(node_at(values, part))


def places(config: Config) -> dict[str, tuple[Place, ...]]:
    """Where each axis that has a field of its own stands; the first place counts, the others repeat it."""
    main, followers = main_path(config), _following(config)
    found: dict[str, tuple[Place, ...]] = {}
    for path, node in sorted(nodes(config), key=lambda entry: entry[0] != main):
        scope = scope_of(config, path)
        for axis, own in _own_places(node, path, followers).items():
            same = not scope and axis in found and own[0].read(config) == found[axis][0].read(config)
            found[f"{scope}{axis}"] = found[axis] + own if same else found.get(f"{scope}{axis}", own)
    if not hasattr(type(config), "num_labels"):
        return found
    return found | {LABELS: (Place((), "num_labels"),)}


def _own_places(
    node: Config, path: tuple[str, ...], followers: Container[tuple[str, ...]]
) -> dict[str, tuple[Place, ...]]:
    """The axes of one config of the tree, by their names in it."""
    family, fields, exceptions = node.model_type, vars(node), exceptions_of(node)  # a config is slow to ask
    derived = DERIVED.get(family, {})
    open_falcon = getattr(node, "new_decoder_architecture", False)  # then its own kv heads count
    computed = computed_fields(node.__class__)
    counts = [fields[name] for name in FIELDS[LAYERS] if name in fields]
    layers = None if any(isinstance(count, list | tuple) for count in counts) else next(iter(counts), None)
    found: dict[str, list[Place]] = {}
    for axis, names in fields_for(family).items():
        for name in (*names, *(f"{name}_per_layer" for name in names)):
            if name not in fields or (axis in derived and not open_falcon) or (*path, name) in followers:
                continue
            value = fields[name]
            if name in computed and not (axis == LAYERS and _listed(node, value)):
                continue
            if isinstance(value, list | tuple):
                if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
                    continue
                if axis != LAYERS and len(value) == layers and (family, name) not in BY_MODALITY:
                    _by_value(found, axis, node, [(v, Place(path, name, i)) for i, v in enumerate(value)])
                else:
                    for i in range(len(value)):
                        found.setdefault(f"{axis}.{i}", []).append(Place(path, name, i))
            elif value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
                times = MULTIPLES.get((family, name), lambda _: 1)(node)
                found.setdefault(axis, []).append(Place(path, name, times=times))
        apart = [(at, own) for at, own in exceptions.items() if own.keys() & {*names}]
        places = [(own[n], Place(path, n, None, at)) for at, own in apart for n in names if n in own]
        _by_value(found, axis, node, places)
    if "mamba.heads" not in found:  # then they are of the only heads there are
        found.pop("mamba.kv_heads", None)
    elif KV_HEADS in found:
        found[KV_HEADS] = [place for place in found[KV_HEADS] if place.field != "n_groups"]
    for kind in (
        LAYERS,
        HEADS,
        FFN,
        KV_HEADS,
    ):  # T5's `num_layers` are its encoder's: its decoder has its own
        if f"decoder.{kind}" in found and kind in found:
            found.setdefault(f"encoder.{kind}", []).extend(found.pop(kind))
    return {axis: _same(node, own) for axis, own in found.items()}


def _by_value(
    found: dict[str, list[Place]], axis: str, node: Config, entries: Sequence[tuple[int, Place]]
) -> None:
    """Places in single layers: one axis for each value that occurs, `ffn`, `ffn.1`, ...; mends `found`."""
    values = [vars(node)[found[axis][0].field]] if axis in found else []
    for value, place in entries:
        if value not in values:
            values.append(value)
        at = values.index(value)
        found.setdefault(f"{axis}.{at}" if at else axis, []).append(place)


def _listed(node: Config, layers: int) -> bool:
    """Whether a list says what each layer is, and so how many there are."""
    return any(
        "layer" in n and isinstance(v, list | tuple) and len(v) == layers for n, v in vars(node).items()
    )


@cache
def computed_fields(config_class: Any) -> frozenset[str]:
    """What the class sets by itself, from the fields that it declares: an entry in a file only repeats it."""
    try:
        made = config_class()
    except Exception:  # a class without defaults; it may raise anything
        return frozenset()
    own = {config_class.attribute_map.get(field.name, field.name) for field in declared(config_class)}
    return frozenset(
        name for name, value in vars(made).items() if name not in own and not isinstance(value, Config)
    )


def _same(node: Config, own: list[Place]) -> tuple[Place, ...]:
    """The first place, and those that repeat what it says."""

    def value(place: Place) -> Any:
        return replace(place, path=()).read(node)

    first = value(own[0])
    return tuple(p for i, p in enumerate(own) if i == 0 or (first is not None and value(p) == first))


def sizes_of(config: Config) -> dict[str, int]:
    """The size of every axis that the config has, in the order of `AXES`, the text part's first."""
    found: dict[str, int | None] = {}
    followers = _following(config)
    for axis, own in places(config).items():
        found[axis] = own[0].read(config)
    for path, node in nodes(config):
        scope, own_fields = scope_of(config, path), vars(node)
        made = computed_fields(node.__class__) & own_fields.keys()
        for axis, derived in DERIVED.get(node.model_type, {}).items():
            found[f"{scope}{axis}"] = derived(node)
        for axis, names in fields_for(node.model_type).items():
            if axis != LAYERS:
                computed = [name for name in names if name in made]
                if not computed or (*path, computed[0]) in followers:
                    continue
                if f"{scope}{axis}" not in found and f"{scope}{axis}.0" not in found:
                    found[f"{scope}{axis}"] = own_fields[computed[0]]
    _complete(found)
    order = {kind: at for at, kind in enumerate(AXES)}
    known = {
        axis: size for axis, size in found.items() if isinstance(size, int) and not isinstance(size, bool)
    }
    return {axis: known[axis] for axis in sorted(known, key=lambda a: (_scope(a), order[kind_of(a)], a))}


def _scope(axis: str) -> str:
    return axis.rpartition(kind_of(axis))[0]


def near(axis: str, kind: str, sizes: Mapping[str, int | None]) -> str | None:
    """The axis of another kind that goes with this one: of its own stage, stack, or what its stacks share."""
    scope, _, stage = axis.rpartition(kind_of(axis))
    scopes = [scope]
    if scope[:-1].rpartition(".")[2] in PARTS:
        scopes.append("".join(scope[:-1].rpartition(".")[:2]))
    names = [f"{own}{kind}{of}" for own in scopes for of in dict.fromkeys((stage, ""))]
    return next((name for name in names if sizes.get(name)), None)


def _complete(found: dict[str, int | None]) -> None:
    """What follows where a config leaves it open: head_dim = hidden / heads, kv_heads = heads, ffn = 4 hidden."""
    for axis in list(
        found
    ):  # as many heads in every layer, but in fewer groups in some: these heads go apart
        if kind_of(axis) == KV_HEADS and axis[-1].isdigit() and axis.rpartition(".")[0] in found:
            found.setdefault(sibling(axis, HEADS), found.get(sibling(axis.rpartition(".")[0], HEADS)))
    for axis, heads in list(found.items()):
        if kind_of(axis) != HEADS or not heads:
            continue
        found[sibling(axis, KV_HEADS)] = found.get(sibling(axis, KV_HEADS)) or heads
        if _scope(axis)[:-1].rpartition(".")[2] in MIXERS:
            continue
        hidden = near(axis, HIDDEN, found)
        staged = axis[-1].isdigit() and hidden and not hidden[-1].isdigit()  # wider by an unknown factor
        if near(axis, HEAD_DIM, found) is None and hidden and not staged:
            found[sibling(axis, HEAD_DIM)] = (found[hidden] or 0) // heads
    for axis, ffn in list(found.items()):  # as GPT-2, GPT-Neo, GPT-J, CodeGen: all whose field may be empty
        if kind_of(axis) == FFN and ffn is None and (hidden := near(axis, HIDDEN, found)):
            found[axis] = 4 * (found[hidden] or 0)


def owner(config: Config, axis: str) -> Config:
    """The config of the tree whose stack this axis belongs to."""
    heads = near(axis, HEADS, sizes_of(config)) or axis
    found = places(config).get(axis) or places(config).get(heads)
    return dict(nodes(config))[found[0].path if found else ()]


def field_of(config: Config, axis: str) -> str | None:
    """The config's own name for an axis, None if it has none of its own (its size then follows others)."""
    own = places(config).get(axis)
    return own[0].field if own else None


def regrouped(config: Config) -> dict[str, str]:
    """The heads of layers that group them otherwise (`heads.1`), by the axis of those that are as many."""
    sizes = sizes_of(config)
    same = {axis: axis.rpartition(".")[0] for axis in sizes if kind_of(axis) == HEADS and axis[-1].isdigit()}
    return {axis: heads for axis, heads in same.items() if heads in sizes and field_of(config, axis) is None}


def layer_axes(config: Config) -> tuple[str, ...]:
    """The axes that count layers, one for each stack."""
    return tuple(axis for axis in sizes_of(config) if kind_of(axis) == LAYERS)


def resize(
    config: Config,
    sizes: Mapping[str, int],
    kept: Mapping[str, Sequence[int]] | None = None,
    **fields: Any,
) -> Config:
    """A config like `config` with these sizes: no rule is applied, the class alone decides what is legal.

    Args:
        config: The source's config; not changed.
        sizes: New sizes by axis. Axes left out, and axes that follow others in this family, are not set.
        kept: The source layer of each target layer, by layer axis; lists with one entry per layer follow it.
        fields: Other fields, in the class's own spelling; `vision_config.patch_size` is one of a sub-config.
    """
    values = config.to_dict()
    values.pop(
        "_name_or_path", None
    )  # the version stays: without, Inkling 2 takes a config for a quantized one's
    known, found = sizes_of(config), places(config)
    for axis, size in sizes.items():
        for place in found.get(axis, ()):
            place.write(values, size)
    for axis, layers in (kept or {}).items():
        if found[axis][0].index is None:  # a list with one entry per stage says nothing of a stage's layers
            own, decoder = node_at(values, found[axis][0].path), axis.endswith(f"decoder.{LAYERS}")
            follow_layers(own, layers, known[axis], SIZE_FIELDS, decoder=decoder)
    _forget_computed(config, values)
    _turn_the_same_part(config, values)
    if sizes.get(LABELS, known.get(LABELS)) != known.get(LABELS):
        values.pop("id2label", None)
        values.pop("label2id", None)
    elif values.get("id2label"):  # they say how many there are
        values.pop("num_labels", None)
    elif LABELS in known:
        values["num_labels"] = known[LABELS]
    for name, value in fields.items():
        *path, last = name.split(".")
        last = getattr(node_at(config, path), "attribute_map", {}).get(last, last)
        node_at(values, path)[last] = value
    for (*path, last), leader in _following(config).items():
        node_at(values, path)[last] = leader(values)
    return type(config).from_dict(values)


def fitted(config: Config) -> Config:
    """The config, with fields that follow others as those say: in a default, parts may not fit together."""
    values = config.to_dict()
    for (*path, last), leader in _following(config).items():
        if node_at(values, path).get(last) != leader(values):
            return resize(config, {})
    return config


def _turn_the_same_part(config: Config, values: dict[str, Any]) -> None:
    """Mistral 4 keeps the part of a head that is rotated as a fraction too: it follows, in place."""
    for path, node in nodes(config):
        own = node_at(values, path)
        rope, turned, rest = (own.get(n) for n in ("rope_parameters", "qk_rope_head_dim", "qk_nope_head_dim"))
        if not isinstance(rope, dict) or not turned or not rest:
            continue
        before = vars(node)["qk_rope_head_dim"], vars(node)["qk_nope_head_dim"]
        if rope.get("partial_rotary_factor") == before[0] / sum(before):
            own["rope_parameters"] = rope | {"partial_rotary_factor": turned / (turned + rest)}


def _forget_computed(config: Config, values: dict[str, Any]) -> None:
    """Leave out what the class computes from the rest, in place: it shall follow the new sizes."""
    for path, node in nodes(config):
        computed = computed_fields(node.__class__) & node_at(values, path).keys()
        if not computed:
            continue
        names = {node.attribute_map.get(field.name, field.name) for field in declared(type(node))}
        own = {name: vars(node)[name] for name in names & vars(node).keys() & node_at(values, path).keys()}
        if exceptions := exceptions_of(node):
            own["per_layer_config"] = exceptions
        again = vars(type(node)(**deepcopy(own)))
        for name in computed:
            if name in again and again[name] == vars(node).get(name):
                del node_at(values, path)[name]


def layer_kinds(config: Config, axis: str = LAYERS) -> list[str]:
    """For each layer, all that the config says about that layer alone; layers of one kind have one structure."""
    layers, (place, *_) = sizes_of(config)[axis], places(config)[axis]
    if place.index is not None:  # a list with one entry per stage says nothing of a stage's layers
        return [""] * layers
    path = place.path
    whole = node_at(config.to_dict(), path)
    kinds = []
    for i in range(layers):
        values = dict(whole)
        follow_layers(values, [i], layers, SIZE_FIELDS, decoder=axis.endswith(f"decoder.{LAYERS}"))
        kinds.append(repr([(name, value) for name, value in values.items() if value is not whole[name]]))
    return kinds
