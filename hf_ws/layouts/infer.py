"""Which axes has each tensor? Read off two miniatures of the model whose axes all have different lengths.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> inferred = infer(LlamaForCausalLM, LlamaConfig())
    >>> inferred.layouts["model.layers.*.self_attn.q_proj.weight"]
    '(heads head_dim) <hidden'

The model class is built twice on the meta device; a dimension is explained by a product of axes, and a number, that
gives its length both times. Often there are several explanations: a product may be stored in any order, and where a
class has no `head_dim` of its own, hidden and heads x head_dim are one length. They are put in order of likelihood,
and `certify` proves one of them or none: nothing here is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ws.axes import (
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MOE_FFN,
    VOCAB,
    kind_of,
    parse,
    split_key,
)
from hf_ws.errors import UnsupportedArchitectureError
from hf_ws.layouts import irregular
from hf_ws.layouts.explain import ATTENTION, Explain, visible_sizes
from hf_ws.layouts.miniature import apart, build_on_meta, miniatures
from hf_ws.layouts.stacks import Stacks, generic, kinds_of, stack_of
from hf_ws.sizes import field_of, layer_axes, regrouped, resize, sizes_of

_OUTPUT = re.compile(
    r"o_proj|out_proj|out_\w+_proj|c_proj|dense|out_lin|linear_out|o|wo|proj|to_out|output|out|post|post_proj|"
    r"post_attention|projection|output_proj|projection_layer"
)
_TABLE = re.compile(r"token|quer(y|ies)$|latents?$|probe|embed|position|bias|table|scale$|static")


@dataclass(frozen=True)
class Choice:
    """What one tensor's dimensions may be, each dimension's explanations most likely first."""

    dims: tuple[tuple[str, ...], ...]
    reads: tuple[int | None, ...]
    """Which dimension is contracted with the activation, most likely first."""

    def text(self, picks: tuple[int, ...] = (), reads: int = 0) -> str:
        """The layout with the given explanation of each dimension."""
        picks = picks or (0,) * len(self.dims)
        at = self.reads[reads]
        return " ".join(
            ("<" if d == at else "") + dim[pick]
            for d, (dim, pick) in enumerate(zip(self.dims, picks, strict=True))
        )


@dataclass(frozen=True)
class Inferred:
    """The layouts of a model class for one config, not yet proven."""

    layouts: dict[str, str]
    """Layout by tensor name, the layer's number written `*`."""
    stacks: Stacks
    """The layer axis of each module list that holds layers, and what kinds of layers there are."""
    miniature: PreTrainedConfig
    choices: dict[str, Choice] = field(default_factory=dict)
    """All the explanations there are, by the same names."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Axes that the miniatures could not vary, and why."""


VARIED = (HIDDEN, FFN, MOE_FFN, HEADS)
"""Kinds of axes that must differ in the two miniatures: what does not is a number in the layouts, and stays."""


def infer(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Inferred:
    """The layout of every tensor of `model_class(config)`.

    Raises:
        UnsupportedArchitectureError: a dimension that no axis explains.
    """
    small, other = miniatures(model_class, config)
    model = apart(build_on_meta(model_class, small))
    fixed: dict[str, str] = {}
    each: dict[tuple[str, int], str] = {}
    behind: dict[str, int] = {}
    stacks = Stacks(
        dict(_stacks(model_class, small, model, fixed, each, behind)), kinds_of(small), behind=behind
    )
    while True:
        shapes = _shapes(model), _shapes(apart(build_on_meta(model_class, other)))
        explain = Explain(small, other, each)
        before = dict(stacks)
        choices, unexplained = _choices(model, shapes, stacks, explain)
        gone = {axis for axis in before.values() if axis not in stacks.values()}
        fixed |= dict.fromkeys(gone, "its layers differ by their number")
        if not unexplained:
            break
        varied = _varied_by(model_class, small, other, unexplained)
        if not varied:
            name, at = next(iter(unexplained.items()))
            raise UnsupportedArchitectureError(
                f"{model_class.__name__}: no axis explains dimension {at} of {name}, which is {shapes[0][name]} in a "
                f"miniature with {sizes_of(small)}"
            )
        fixed |= dict.fromkeys(varied, f"nothing explains how {next(iter(unexplained))} depends on it")
        other = resize(other, {axis: sizes_of(small)[axis] for axis in varied})
    for axis, size in visible_sizes(small).items():
        if size == visible_sizes(other).get(axis) and kind_of(axis) in VARIED and field_of(small, axis):
            fixed.setdefault(axis, "its class allows a miniature no other")
    layouts = {name: choice.text() for name, choice in choices.items()}
    return Inferred(layouts, stacks, small, choices, fixed)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that a checkpoint of this model holds: parameters, and the buffers that are saved; what is tied, once."""
    saved = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def _stacks(
    model_class: type[PreTrainedModel],
    small: PreTrainedConfig,
    model: nn.Module,
    fixed: dict[str, str],
    each: dict[tuple[str, int], str],
    behind: dict[str, int],
) -> Iterator[tuple[str, str]]:
    """Every module list that grows when a layer is added, with the axis that counts its layers.

    An axis that changes the model otherwise goes into `fixed`; one that does not change it is no axis of this class.
    A tensor's dimension that has as much for each layer goes into `each`, with that axis; a list that has one entry
    less than there are layers into `behind`.
    """
    lists = {name: depth for name, module in model.named_modules() if (depth := _depth(module)) is not None}
    for axis in layer_axes(small):
        depth = sizes_of(small)[axis]
        try:
            longer = resize(small, {axis: depth + 1}, {axis: [*range(depth), depth - 1]})
            deeper = apart(build_on_meta(model_class, longer))
        except Exception:  # whatever the class objects to: then its layers are not counted by this axis alone
            fixed[axis] = "the class refuses one layer more"
            continue
        found = False
        for name, module in deeper.named_modules():
            if name in lists and _depth(module) == lists[name] + 1:
                found = True
                behind |= {name: 1} if lists[name] == depth - 1 else {}
                yield name, axis
        shapes, grown = _shapes(model), _shapes(deeper)
        if not found and grown != shapes:
            fixed[axis] = "no list of layers has that length"
            continue
        for name in (name for name in shapes if grown.get(name, shapes[name]) != shapes[name]):
            changed = _of_each_layer(shapes[name], grown[name], depth)
            each |= {(name, at): axis for at in changed}
            if not changed:
                fixed[axis] = f"the shape of {name} depends on it"


def _of_each_layer(shape: tuple[int, ...], grown: tuple[int, ...], depth: int) -> list[int]:
    """The dimensions that have as much for each of so many layers, as one layer more tells; none if any has not."""
    changed = [at for at, (size, more) in enumerate(zip(shape, grown, strict=True)) if size != more]
    return changed if all(shape[at] * (depth + 1) == grown[at] * depth for at in changed) else []


def _depth(module: nn.Module) -> int | None:
    """How many layers a module may be a stack of: the entries of a list, the layers of an LSTM."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return len(module)
    return module.num_layers if isinstance(module, nn.RNNBase) else None


def _choices(
    model: PreTrainedModel,
    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]],
    stacks: Stacks,
    explain: Explain,
) -> tuple[dict[str, Choice], dict[str, int]]:
    """The explanations of every tensor, and the dimensions that have none."""
    lying: dict[str, dict[str, Choice]] = {}
    unexplained: dict[str, int] = {}
    for name, tensor in tensors_of(model).items():
        module = model.get_submodule(
            name.rpartition(".")[0].partition(".parametrizations")[0]
        )  # not what norms it
        whole = model.get_submodule(".".join(name.split(".")[:-2]))
        choice = _choice(name, module, whole, tensor, shapes[1].get(name), explain, model.config)
        if isinstance(choice, int):
            unexplained[name] = choice
        else:
            lying.setdefault(generic(name, stacks)[0], {})[name] = choice
    choices: dict[str, Choice] = {}
    if regrouped(model.config):
        lying = _agreeing(lying)
    for pattern, own in lying.items():
        if len({*own.values()}) > 1:
            by_layer = {split_key(generic(name, stacks)[1] or 0)[1]: way for name, way in own.items()}
            if not stacks.part(pattern, by_layer):
                _part_first(stacks, stack_of(pattern))
                return _choices(model, shapes, stacks, explain)
        choices |= {generic(name, stacks)[0]: choice for name, choice in own.items()}
    return choices, unexplained


def _agreeing(lying: Mapping[str, dict[str, Choice]]) -> dict[str, dict[str, Choice]]:
    """The same, with those heads first everywhere in an attention whose groups its keys have.

    Where some layers group as many heads otherwise, lengths do not tell `heads` from `heads.1`, but `kv_heads.1` do.
    """
    stages: dict[str, set[str]] = {}
    for name, choice in ((name, choice) for own in lying.values() for name, choice in own.items()):
        for dim in choice.dims:
            likely = {_stage(axis) for axis in parse(dim[0])[0].axes if kind_of(axis) == KV_HEADS}
            stages.setdefault(_module_of(name), set()).update(likely)

    def off(text: str, stage: str) -> bool:
        return any(_stage(axis) != stage for axis in parse(text)[0].axes if kind_of(axis) == HEADS)

    def agreed(name: str, choice: Choice) -> Choice:
        own = stages.get(_module_of(name), set())
        if len(own) != 1:
            return choice
        dims = tuple(tuple(sorted(dim, key=lambda text: off(text, min(own)))) for dim in choice.dims)
        return replace(choice, dims=dims)

    return {
        pattern: {name: agreed(name, choice) for name, choice in own.items()}
        for pattern, own in lying.items()
    }


def _stage(axis: str) -> str:
    return axis.rpartition(kind_of(axis))[2]


def _module_of(name: str) -> str:
    return ".".join(name.split(".")[:-2])


def _part_first(stacks: Stacks, stack: str) -> None:
    """Set a stack's first layer apart from the others, or drop the stack where it is already."""
    stacks.apart = {name: kinds for name, kinds in stacks.apart.items() if stack_of(name) != stack}
    if f"{stack}.0" not in stacks:  # the first of a stage halves the picture and doubles the channels
        stacks[f"{stack}.0"] = stacks[stack]
    else:  # its layers differ by number: they stay as many as they are
        del stacks[stack], stacks[f"{stack}.0"]


def _choice(
    name: str,
    module: nn.Module,
    whole: nn.Module,
    tensor: torch.Tensor,
    other: tuple[int, ...] | None,
    explain: Explain,
    config: PreTrainedConfig,
) -> Choice | int:
    """The explanations of one tensor, or the number of the dimension that has none."""
    reads = (None,) if name.endswith("bias") else _reading(module, name.rpartition(".")[2], tensor)
    row = irregular.row_for(config, name.rpartition(".")[0])
    dims: list[tuple[str, ...]] = []
    for at, size in enumerate(tensor.shape):
        if row is not None and at != reads[0]:
            dims.append((row.writes,))
            continue
        inner = _is_inner(module, whole, name, at == reads[0])
        there = other[at] if other and len(other) == tensor.ndim else None
        found = explain(size, there, inner, at == reads[0], name, at)
        if not found:
            return at
        dims.append(found)
    if (
        reads == (1,) and kind_of(dims[1][0]) == VOCAB
    ):  # a table of tokens, or a head's other part (MobileBERT)
        reads = (1, 0)
    return Choice(tuple(dims), reads)


def _varied_by(
    model_class: type[PreTrainedModel],
    small: PreTrainedConfig,
    other: PreTrainedConfig,
    unexplained: Mapping[str, int],
) -> list[str]:
    """The axes on which the lengths of these tensors' dimensions depend."""
    before, after = sizes_of(small), sizes_of(other)
    own = _shapes(apart(build_on_meta(model_class, small)))
    found, maybe = [], []
    for axis, size in before.items():
        if after.get(axis) == size or kind_of(axis) == LAYERS or field_of(small, axis) is None:
            continue
        try:
            varied = _shapes(apart(build_on_meta(model_class, resize(small, {axis: after[axis]}))))
        except Exception:  # an axis that cannot vary alone may be the one, if no other is
            maybe.append(axis)
            continue
        if any(_length_at(varied, name, at) != own[name][at] for name, at in unexplained.items()):
            found.append(axis)
    return found or maybe


def _length_at(shapes: Mapping[str, tuple[int, ...]], name: str, at: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[at] if at < len(shape) else None


def _reading(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[int | None, ...]:
    """The dimension that may be contracted with the activation; None for what only writes (tables, norms, biases)."""
    if tensor.ndim < 2 or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
        return (None,)
    if _is_linear(module):
        return (1,)
    if isinstance(module, Conv1D | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return (0,)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (1,) if tensor.shape[1] > 1 or module.groups == 1 else (None,)
    last, before = tensor.ndim - 1, tensor.ndim - 2
    if (
        getattr(module, "is_transposed", False) is True and tensor.ndim == 3
    ):  # experts that are stored as (in, out)
        return (before, None, last)
    if (tensor.ndim >= 3 and tensor.shape[0] == 1) or _TABLE.search(
        name
    ):  # a token, or a table of them, that is added
        return (None, last, before)
    return (last, None, before)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module maps so many features to others, be it of the class's own making (I-BERT's quantized ones)."""
    return isinstance(module, nn.Linear) or {"in_features", "out_features"} <= vars(module).keys()


def _is_inner(module: nn.Module, whole: nn.Module, name: str, reads: bool) -> bool:
    """Whether this dimension of an attention's tensor lies on the heads' side, not the residual stream's.

    An attention is called so, or the class of what the module is a direct part of, the `whole`, is.
    """
    path = name.split(".")
    about = [
        part for part in path[:-1] if not part.endswith("layers")
    ]  # a stack may be called after what it has
    own = type(whole).__name__
    own = "" if own.endswith("coderLayer") else own  # an attention is a part of that (Mask2Former)
    if not ATTENTION.search(".".join([*about, own]).lower()):
        return False
    if isinstance(module, nn.MultiheadAttention):  # all its heads' queries, keys and values
        return not reads
    if any(isinstance(part, nn.MultiheadAttention) for part in whole.children()):  # which has the heads
        return False
    leaf = next(
        part for part in reversed(path[:-1]) if not part.isdigit() and part not in ("linear", "conv1d")
    )  # what that clips, or has as one of its parts
    if "mlp" in path:  # Perceiver's is a part of what it calls an attention
        return False
    if leaf in (
        "sr",
        "sequence_reduction",
        "spatial_reduction",
    ):  # a smaller picture, for the keys and values to read
        return False
    if (
        isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels
    ):  # of the picture, before any head
        return False
    if _is_linear(module) or isinstance(module, Conv1D | nn.Conv1d | nn.Conv2d):
        return reads == bool(_OUTPUT.fullmatch(leaf.lower()))
    # A norm over all heads is named after what it norms; any other norm in an attention is on the stream.
    return leaf.startswith(("q_", "k_", "v_", "query", "key", "inner"))
