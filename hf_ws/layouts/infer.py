"""Which axes has each parameter? Read off a miniature of the model whose axes all have different lengths.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> inferred = infer(LlamaForCausalLM, LlamaConfig())
    >>> inferred.layouts["model.layers.*.self_attn.q_proj.weight"]
    '(heads head_dim) <hidden'

The model class is built on the meta device from the caller's own config with its sizes replaced, so flags and
per-layer kinds are those of the model at hand. A dimension's length then names its axes. Where a class has no
`head_dim` of its own, hidden and heads x head_dim have one length; the module it sits in tells them apart. Nothing
here is trusted: `certify` proves the result or refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ws.axes import (
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
    length,
    parse,
)
from hf_ws.errors import UnsupportedArchitectureError
from hf_ws.layouts import irregular
from hf_ws.sizes import DERIVED, field_of, layer_kinds, resize, sizes_of

MINIATURE = {
    HIDDEN: 135,
    HEADS: 15,
    KV_HEADS: 5,
    HEAD_DIM: 16,
    FFN: 88,
    MOE_FFN: 34,
    EXPERTS: 7,
    VOCAB: 211,
    POSITIONS: 71,
    EMBEDDING: 48,
    LABELS: 37,
}
"""Lengths no two of which can be mistaken for each other, nor for a product or sum in `EXPRESSIONS`."""

EXPRESSIONS = (
    *(HIDDEN, VOCAB, FFN, MOE_FFN, EXPERTS, EMBEDDING, LABELS, POSITIONS, HEAD_DIM, HEADS, KV_HEADS),
    "(heads head_dim)",
    "(kv_heads head_dim)",
    "(2 ffn)",
    "(2 moe_ffn)",
    "(heads head_dim + kv_heads head_dim + kv_heads head_dim)",
    "(3 heads head_dim)",
    "(2 + positions)",
)
"""What a dimension may be, other than a row of `irregular` or a small constant; the first that fits is taken."""

LARGEST_CONSTANT = 4  # a token-type table has 2 rows; anything longer is an axis that we do not know

_OUTPUT = re.compile(r"o_proj|out_proj|c_proj|dense|out_lin|o|wo")  # the attention's last projection
_ATTENTION = re.compile(r"(attn|attention)")


@dataclass(frozen=True)
class Inferred:
    """The layouts of a model class for one config, not yet proven."""

    layouts: dict[str, str]
    """Layout by parameter name, the layer's number written `*`."""
    stacks: tuple[str, ...]
    """Names of the module lists that hold the layers."""
    miniature: PreTrainedConfig


def infer(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Inferred:
    """The layout of every parameter of `model_class(config)`.

    Raises:
        UnsupportedArchitectureError: a dimension that is explained by no axis, or a stack that was not found.
    """
    small = miniature(config)
    model = build_on_meta(model_class, small)
    deeper = build_on_meta(model_class, resize(small, {LAYERS: 4}, [*range(3), 2]))
    stacks = _stacks(model, deeper)
    if not stacks:
        raise UnsupportedArchitectureError(
            f"{model_class.__name__}: no module list grows with {field_of(config, LAYERS)}; its layers were not found"
        )
    if kept := sorted(
        model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    ):
        raise UnsupportedArchitectureError(
            f"{model_class.__name__} keeps part of its state in buffers ({', '.join(kept[:3])}), and only parameters "
            "are transferred"
        )
    lengths = _lengths(small)
    layouts: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        text = _layout(name, parameter, model, small, lengths)
        pattern = generic(name, stacks)[0]
        if layouts.setdefault(pattern, text) != text:
            raise UnsupportedArchitectureError(
                f"{model_class.__name__}: {pattern} is {layouts[pattern]!r} in one layer and {text!r} in another"
            )
    return Inferred(layouts, stacks, small)


def miniature(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same kind with small sizes that are all different, and one layer of every kind there is."""
    source = sizes_of(config)
    sizes = {axis: size for axis, size in MINIATURE.items() if axis in source}
    sizes |= irregular.MINIATURES.get(config.model_type, {})
    if field_of(config, HEAD_DIM) is None:
        sizes[HIDDEN] = sizes[HEADS] * sizes[HEAD_DIM]
    if EMBEDDING in source and source[EMBEDDING] == source[HIDDEN]:
        sizes[EMBEDDING] = sizes[HIDDEN]
    kinds = layer_kinds(config)
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept += [kept[-1]] * (3 - len(kept))
    sizes[LAYERS] = len(kept)
    return resize(config, sizes, kept, **irregular.small_fields(config))


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory: shapes and names only."""
    with torch.device("meta"):
        return model_class(config)


def _stacks(model: nn.Module, deeper: nn.Module) -> tuple[str, ...]:
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    grown = {
        name: len(module) for name, module in deeper.named_modules() if isinstance(module, nn.ModuleList)
    }
    return tuple(name for name, count in lists.items() if grown.get(name) == count + 1)


def generic(name: str, stacks: tuple[str, ...]) -> tuple[str, int | None]:
    """A parameter's name with its layer's number written `*`, and that number (None outside the layers)."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            number, _, rest = name[len(stack) + 1 :].partition(".")
            if not number.isdigit():
                break
            return f"{stack}.*.{rest}", int(number)
    return name, None


def _layout(
    name: str,
    parameter: torch.Tensor,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    lengths: Mapping[str, int],
) -> str:
    module_name = name.rpartition(".")[0]
    module = model.get_submodule(module_name)
    reads = _reading_dim(module, parameter)
    row = irregular.row_for(config, module_name)
    in_attention = bool(_ATTENTION.search(module_name))
    dims = []
    for at, size in enumerate(parameter.shape):
        if row is not None and at != reads:
            dims.append(row.writes)
            continue
        inner = in_attention and _is_inner(module, module_name, at == reads)
        text = _expression(size, lengths, inner)
        if text is None:
            raise UnsupportedArchitectureError(
                f"{type(model).__name__}: no axis explains dimension {at} of {name}, of length {size} in a miniature "
                f"with {sizes_of(config)}"
            )
        dims.append(f"<{text}" if at == reads else text)
    return " ".join(dims)


def _reading_dim(module: nn.Module, parameter: torch.Tensor) -> int | None:
    """The position that is contracted with the activation; None for what only writes (tables, norms, biases)."""
    if parameter.ndim < 2 or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
        return None
    return 0 if isinstance(module, Conv1D) else parameter.ndim - 1


def _is_inner(module: nn.Module, name: str, reads: bool) -> bool:
    """Whether this dimension of an attention's parameter lies on the heads' side, not the residual stream's."""
    leaf = name.split(".")[-1].lower()
    if isinstance(module, nn.Linear | Conv1D):
        return reads == bool(_OUTPUT.fullmatch(leaf))
    # A norm over all heads is named after what it norms; any other norm in an attention is on the stream.
    return leaf.startswith(("q_", "k_", "query", "key"))


def _expression(size: int, lengths: Mapping[str, int], inner: bool) -> str | None:
    matches = [text for text, length in lengths.items() if length == size]
    if HIDDEN in matches and "(heads head_dim)" in matches:
        return "(heads head_dim)" if inner else HIDDEN
    if matches:
        return matches[0]
    return str(size) if size <= LARGEST_CONSTANT else None


def visible_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The sizes that can show in a parameter: not those that merely repeat another (`kv_heads` in GPT-2)."""
    sizes = sizes_of(config)
    if field_of(config, KV_HEADS) is None and KV_HEADS not in DERIVED.get(config.model_type, {}):
        del sizes[KV_HEADS]
    if sizes.get(EMBEDDING) == sizes[HIDDEN]:
        del sizes[EMBEDDING]
    return sizes


def _lengths(config: PreTrainedConfig) -> dict[str, int]:
    """How long each of `EXPRESSIONS` is in this config, those left out that speak of axes it does not have."""
    sizes = visible_sizes(config)
    dims = {text: parse(text)[0] for text in EXPRESSIONS}
    return {text: length(dim, sizes) for text, dim in dims.items() if set(dim.axes) <= set(sizes)}
