"""The sizes of a config's axes, and the config of another size.

    >>> from transformers import GPT2Config
    >>> large = GPT2Config(n_embd=1280, n_head=20, n_layer=36)
    >>> sizes_of(large)["ffn"]
    5120
    >>> derive_config(large, hidden=512).n_head          # head_dim stays 64
    8

A config class spells its sizes its own way (`hidden_size`, `n_embd`, `d_model`, `dim`); `FIELDS` is the whole
dictionary. What the user does not ask for follows from what they do: see `derive_config`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
    POSITIONS,
    VOCAB,
)
from hf_ws.errors import PlanError, SizeError

FIELDS: dict[str, tuple[str, ...]] = {
    HIDDEN: ("hidden_size", "n_embd", "d_model", "dim"),
    LAYERS: ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    HEADS: ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    KV_HEADS: ("num_key_value_heads", "num_kv_heads"),
    HEAD_DIM: ("head_dim",),
    FFN: ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    MOE_FFN: ("moe_intermediate_size",),
    EXPERTS: ("num_local_experts", "num_experts", "n_routed_experts"),
    VOCAB: ("vocab_size",),
    POSITIONS: ("max_position_embeddings", "n_positions", "max_seq_len"),
    EMBEDDING: ("embedding_size", "word_embed_proj_dim"),
    LABELS: ("num_labels",),
}
"""How config classes spell each axis; the first name that a config has is the one it uses."""


def _falcon_kv_heads(config: Config) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


DERIVED: dict[str, dict[str, Callable[[Config], int]]] = {
    "bloom": {FFN: lambda config: 4 * config.hidden_size},
    "mpt": {FFN: lambda config: config.expansion_ratio * config.d_model},
    "falcon": {KV_HEADS: _falcon_kv_heads},
}
"""Sizes that a family computes from other fields although it may have a field of that name."""


FOLLOWERS = {("codegen", "n_ctx"): "n_positions", ("falcon", "num_kv_heads"): "num_attention_heads"}
"""Fields that repeat another, by family, where they are no axis of their own."""


def field_of(config: Config, axis: str) -> str | None:
    """The config's own name for an axis, None if it has none of its own (its size then follows others)."""
    if axis in DERIVED.get(config.model_type, {}) and not getattr(config, "new_decoder_architecture", False):
        return None
    if axis == LABELS:
        return "num_labels"  # a property: what is stored is a dictionary of their names
    return next((name for name in FIELDS[axis] if name in vars(config)), None)


def sizes_of(config: Config) -> dict[str, int]:
    """The size of every axis that the config has, in the order of `AXES`.

    Raises:
        SizeError: the config has no hidden size, layers or heads under a known name.
    """
    found: dict[str, int | None] = {}
    for axis in AXES:
        derived = DERIVED.get(config.model_type, {}).get(axis)
        name = field_of(config, axis)
        found[axis] = derived(config) if derived else getattr(config, name) if name else None
    missing = [axis for axis in (HIDDEN, LAYERS, HEADS) if not isinstance(found[axis], int)]
    if missing:
        names = "; ".join(f"{axis}: {', '.join(FIELDS[axis])}" for axis in missing)
        raise SizeError(
            f"{type(config).__name__} spells no {' and no '.join(missing)} that is known here ({names})"
        )
    hidden, heads = found[HIDDEN], found[HEADS]
    assert hidden is not None
    assert heads is not None
    found[HEAD_DIM] = found[HEAD_DIM] or hidden // heads
    found[KV_HEADS] = found[KV_HEADS] or heads
    if found[FFN] is None and field_of(config, FFN):
        found[FFN] = (
            4 * hidden
        )  # what every family whose field may be empty does (GPT-2, GPT-Neo, GPT-J, CodeGen)
    return {axis: size for axis, size in found.items() if size is not None}


def resize(
    config: Config, sizes: Mapping[str, int], kept: Sequence[int] | None = None, **fields: Any
) -> Config:
    """A config like `config` with these sizes: no rule is applied, the class alone decides what is legal.

    Args:
        config: The source's config; not changed.
        sizes: New sizes by axis. Axes left out, and axes that follow others in this family, are not set.
        kept: The source layer of each target layer; lists with one entry per layer follow it.
        fields: Other fields, in the class's own spelling.
    """
    values = config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        values.pop(name, None)
    if kept is not None:
        _follow_layers(values, kept, sizes_of(config)[LAYERS])
    for axis, size in sizes.items():
        if (own := field_of(config, axis)) is not None:
            values[own] = size
    if sizes.get(LABELS, config.num_labels) != config.num_labels:
        del values["id2label"], values["label2id"]
    else:
        values.pop("num_labels", None)
    for (model_type, name), leader in FOLLOWERS.items():
        if config.model_type == model_type and name not in map(partial(field_of, config), AXES):
            values[name] = values[leader]
    return type(config).from_dict(values | fields)


def _follow_layers(values: dict[str, Any], kept: Sequence[int], layers: int) -> None:
    """Every per-layer entry of a config's dict rewritten for the kept layers, in place."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) == layers and ("layer" in name or "pattern" in name):
            values[name] = [value[i] for i in kept]
    if (
        "attention_types" in values
    ):  # GPT-Neo writes its list run by run, and derives `attention_layers` from it
        values["attention_types"] = [[list(values["attention_layers"]), 1]]
    if "mlp_only_layers" in values:  # Qwen MoE: which layers are dense, by index or by a step
        dense, step = set(values["mlp_only_layers"] or ()), values.get("decoder_sparse_step", 1)
        dense |= {i for i in range(layers) if (i + 1) % step}
        values["mlp_only_layers"] = [j for j, i in enumerate(kept) if i in dense]
        values["decoder_sparse_step"] = 1
    if isinstance(values.get("max_window_layers"), int):
        values["max_window_layers"] = min(values["max_window_layers"], len(kept))


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
    kept: Sequence[int] | None = None,
    **config_fields: Any,
) -> Config:
    """The config of another size: what is asked for, and what follows from it.

    `head_dim` stays, so `heads` follows `hidden`. The ratio of query heads to key/value heads stays, or becomes the
    nearest legal one that gives no key/value head more query heads than it had. The ratio of `ffn` to `hidden` stays,
    rounded to a multiple of 64 (or of what the source's own is a multiple of, if that is less). Lists with one entry
    per layer follow the kept layers.

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
        kept: The source layer of each target layer; the first `layers` if not given.
        config_fields: Any field of the config class in its own spelling. One that names a size (`n_embd`,
            `hidden_size`) means the same as ours.

    Raises:
        SizeError: no legal target has these sizes; lists every violation and the nearest legal values.
        PlanError: a field that the class does not have, or a size that was given twice.
    """
    named = {
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
        config, {axis: size for axis, size in named.items() if size is not None}, config_fields
    )
    if kept is not None:
        if asked.setdefault(LAYERS, len(kept)) != len(kept):
            raise SizeError(f"layers={asked[LAYERS]}, but {len(kept)} layers are kept: {list(kept)}")
        depth = sizes_of(config)[LAYERS]
        outside = [i for i in kept if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth]
        if outside or not kept:
            raise SizeError(f"kept layers {list(kept)}: allowed are 0 to {depth - 1}, at least one")
    problems, derived = _attempt(config, asked, kept, fields)
    if derived is None:
        raise SizeError("; ".join(problems + list(_hints(config, asked, kept, fields))))
    return derived


def read_request(
    config: Config, asked: Mapping[str, int], fields: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, Any]]:
    """What was asked for, as sizes by axis and other fields in the class's own spelling. Raises as `derive_config`."""
    sizes, rest = dict(asked), dict[str, Any]()
    spelled = {name: axis for axis, names in FIELDS.items() for name in (*names, axis)}
    known = set(config.to_dict()) | set(config.attribute_map) | {"num_labels"}
    for name, value in fields.items():
        axis = spelled.get(name)
        if name in ("id2label", "label2id") and value:
            pairs = value.items() if name == "id2label" else ((i, label) for label, i in value.items())
            names = {int(i): label for i, label in pairs}
            rest |= {"id2label": names, "label2id": {label: i for i, label in names.items()}}
            if sizes.setdefault(LABELS, len(names)) != len(names):
                raise PlanError(f"labels is given twice: {sizes[LABELS]}, and {len(names)} in {name}")
        elif axis is not None and (name in known or axis in sizes_of(config)):
            if value is not None and sizes.setdefault(axis, value) != value:
                raise PlanError(f"{axis} is given twice: {axis}={sizes[axis]} and {name}={value}")
        elif name in known:
            rest[config.attribute_map.get(name, name)] = value
        else:
            near = difflib.get_close_matches(name, [*AXES, *known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"{type(config).__name__} has no field {name!r}{hint}")
    return sizes, rest


def _attempt(
    config: Config, asked: Mapping[str, int], kept: Sequence[int] | None, fields: Mapping[str, Any]
) -> tuple[list[str], Config | None]:
    """The derived config, or why there is none."""
    source = sizes_of(config)
    problems = list(_malformed(config, source, asked))
    if problems:
        return problems, None
    target = _follow(config, source, asked)
    problems = list(_violations(config, source, target, asked, fields))
    if problems:
        return problems, None
    changed = {axis: size for axis, size in target.items() if size != source[axis] or axis in asked}
    if HEADS in changed:  # where the field may be empty (Mixtral), it would follow hidden / heads
        changed[HEAD_DIM] = target[HEAD_DIM]
    if kept is None and target[LAYERS] != source[LAYERS]:
        kept = [min(i, source[LAYERS] - 1) for i in range(target[LAYERS])]
    try:
        derived = resize(config, changed, kept, **fields)
    except Exception as error:  # a config class may raise anything; whatever it is, it refused these sizes
        return [f"{type(config).__name__} refuses these sizes: {_innermost(error)}"], None
    wrong = {axis: size for axis, size in sizes_of(derived).items() if size != target[axis]}
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
    own_head_dim = field_of(config, HEAD_DIM) is not None
    if HEADS not in asked and HIDDEN in asked:
        if source[HEADS] * source[HEAD_DIM] == source[HIDDEN]:
            target[HEADS] = target[HIDDEN] // target[HEAD_DIM]
        else:
            target[HEADS] = max(1, round(source[HEADS] * target[HIDDEN] / source[HIDDEN]))
    if HEAD_DIM not in asked and not own_head_dim and target[HEADS]:
        target[HEAD_DIM] = target[HIDDEN] // target[HEADS]
        if HEADS not in asked:
            target[HEAD_DIM] = source[HEAD_DIM]
    if KV_HEADS not in asked and target[HEADS]:
        width = source[HEADS] / source[KV_HEADS]  # wider groups no selection of whole heads could give
        target[KV_HEADS] = min(d for d in _divisors(target[HEADS]) if target[HEADS] <= d * width)
    for axis in (FFN, MOE_FFN):
        if axis in source and axis not in asked and HIDDEN in asked:
            unit = math.gcd(64, source[axis])
            wanted = source[axis] * target[HIDDEN] / source[HIDDEN]
            target[axis] = max(unit, unit * round(wanted / unit))
    if EMBEDDING in source and EMBEDDING not in asked and source[EMBEDDING] == source[HIDDEN]:
        target[EMBEDDING] = target[HIDDEN]
    for axis in DERIVED.get(config.model_type, {}):
        if axis == FFN and axis not in asked:
            target[axis] = source[axis] * target[HIDDEN] // source[HIDDEN]
    return target


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _violations(
    config: Config,
    source: Mapping[str, int],
    target: Mapping[str, int],
    asked: Mapping[str, int],
    fields: Mapping[str, Any],
) -> Iterator[str]:
    hidden, heads, kv_heads, head_dim = (target[a] for a in (HIDDEN, HEADS, KV_HEADS, HEAD_DIM))
    coupled = field_of(config, HEAD_DIM) is None
    followed = source[HEADS] * source[HEAD_DIM] == source[HIDDEN] and HIDDEN in asked and HEADS not in asked
    if heads < 1 or ((coupled or followed) and hidden != heads * head_dim):
        yield f"hidden={hidden} is not a whole number of heads of {head_dim} channels"
    elif heads % kv_heads:
        yield f"heads={heads} is no multiple of kv_heads={kv_heads}"
    if head_dim % 2 and hasattr(config, "rope_parameters"):
        yield f"head_dim={head_dim} is odd, and rotary positions turn pairs of channels"

    def value(name: str) -> Any:
        return fields.get(name, getattr(config, name, None))

    rotary_dim, per_token = value("rotary_dim"), value("num_experts_per_tok")
    if isinstance(rotary_dim, int) and rotary_dim > head_dim:
        yield f"head_dim={head_dim} is less than rotary_dim={rotary_dim}; give rotary_dim= as well"
    if EXPERTS in target and isinstance(per_token, int) and target[EXPERTS] < per_token:
        yield f"experts={target[EXPERTS]} is less than the {per_token} that each token is sent to"
    if VOCAB in asked:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = value(name) if isinstance(value(name), list) else [value(name)]
            if any(isinstance(i, int) and i >= asked[VOCAB] for i in ids):
                yield f"vocab={asked[VOCAB]} leaves out {name}={value(name)}; give {name}= as well"


def _hints(
    config: Config, asked: Mapping[str, int], kept: Sequence[int] | None, fields: Mapping[str, Any]
) -> Iterator[str]:
    """For each size asked for that alone can mend the request, its nearest legal values."""
    for axis, size in asked.items():
        if isinstance(size, bool) or not isinstance(size, int) or axis == LAYERS:
            continue
        smaller, larger = (
            range(min(size, 2**20) - 1, max(0, size - 513), -1),
            range(max(size, 0) + 1, size + 513),
        )
        legal = []
        for candidates in (smaller, larger):
            for candidate in candidates:
                if _attempt(config, {**asked, axis: candidate}, kept, fields)[1] is not None:
                    legal.append(candidate)
                    break
        if legal:
            yield f"nearest legal: {axis}={' or '.join(map(str, legal))}"


def layer_kinds(config: Config) -> list[str]:
    """For each layer, all that the config says about that layer alone; layers of one kind have one structure."""
    layers = sizes_of(config)[LAYERS]
    kinds = []
    for i in range(layers):
        values = config.to_dict()
        names = [name for name, value in values.items() if "layer" in name or "pattern" in name]
        _follow_layers(values, [i], layers)
        kinds.append(repr([(name, values[name]) for name in names]))
    return kinds
