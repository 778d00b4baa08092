"""Which inner states of a student and its teacher mean the same, and the losses that compare them.

A student's plan says from which layer and which channels of the source each of its own comes, so nothing is learned,
and nothing is saved, to compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ws.axes import HEADS, HIDDEN, kind_of, parse
from hf_ws.distill.attention_relation import attention_relation
from hf_ws.distill.hidden_cosine import hidden_cosine
from hf_ws.distill.hidden_mse import hidden_mse
from hf_ws.errors import DistillationError
from hf_ws.layouts import certify
from hf_ws.maps import Dense, Gather
from hf_ws.plan import Plan
from hf_ws.sizes import near, sizes_of

STATE_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "hidden_mse": hidden_mse,
    "hidden_cosine": hidden_cosine,
    "attention_relation": attention_relation,
}
"""The first two of states [tokens, channels] after every layer; the third of attention in the last layer alone."""


@dataclass(frozen=True)
class Pair:
    """A place in the student, and the place in the teacher that it comes from."""

    student: str
    """A module's name."""
    teacher: str
    channels: Tensor | None = None
    """Which of the teacher's channels the student's come from, [student channels]; or of which sums of them, [student
    channels, teacher channels]; None for all."""

    def seen(self, states: Tensor) -> Tensor:
        """The teacher's states [..., teacher channels] in the student's channels."""
        if self.channels is None:
            return states
        channels = self.channels.to(states.device)
        return states[..., channels] if channels.ndim == 1 else states @ channels.to(states.dtype).mT


@dataclass(frozen=True)
class Correspondence:
    """What of two models can be compared."""

    layers: tuple[Pair, ...]
    """Layers, by what they give."""
    attention: tuple[Pair, ...]
    """The output projections of the last layers' attention, by what they read."""

    @classmethod
    def of(cls, student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan | None) -> Correspondence:
        """What the student's plan says.

        Raises:
            DistillationError: There is no plan and the models differ in size; or the teacher is not what the plan was
                made for.
        """
        certificate = certify(type(student), student.config)
        before, own = sizes_of(teacher.config), sizes_of(student.config)
        compared = {axis for axis in own if kind_of(axis) == HIDDEN} | {*certificate.stacks.values()}
        wanted = plan.source_sizes if plan else own
        unlike = [axis for axis in sorted(compared) if before.get(axis) != wanted.get(axis)]
        if unlike or type(teacher) is not type(student):
            raise DistillationError(_unlike(student, teacher, plan, unlike))
        layers, attention = [], []
        for stack, axis in certificate.stacks.items():
            if axis not in own or not isinstance(student.get_submodule(stack), nn.ModuleList):
                continue
            kept = plan.layers[axis] if plan else tuple(range(own[axis]))
            channels = _channels(plan, near(axis, HIDDEN, own))
            layers += [Pair(f"{stack}.{i}", f"{stack}.{s}", channels) for i, s in enumerate(kept)]
            last = f"{stack}.{len(kept) - 1}", f"{stack}.{kept[-1]}"
            for pattern, layout in certificate.layouts.items():
                if pattern.startswith(f"{stack}.*.") and _gathers_heads(layout):
                    inner = pattern.removeprefix(f"{stack}.*").rpartition(".")[0]
                    attention.append(Pair(last[0] + inner, last[1] + inner))
        return cls(tuple(layers), tuple(attention))


def _unlike(student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan | None, axes: list[str]) -> str:
    wanted, came = plan.source_sizes if plan else sizes_of(student.config), sizes_of(teacher.config)
    sizes = ", ".join(f"{axis} {came.get(axis)} and not {wanted.get(axis)}" for axis in axes)
    whose = (
        "the source that the student's plan names"
        if plan
        else "the student itself, which has no hf_ws_plan.json"
    )
    return (
        f"inner states of a {type(teacher).__name__} cannot be compared with this {type(student).__name__}'s"
        f"{f' ({sizes})' if sizes else ''}; the teacher must have the class and sizes of {whose}"
    )


def _channels(plan: Plan | None, hidden: str | None) -> Tensor | None:
    kept = plan.axis_map(hidden) if plan and hidden else None
    if isinstance(kept, Dense):
        return torch.from_numpy(kept.write)
    return torch.tensor(kept.index) if isinstance(kept, Gather) and len(kept) != kept.size else None


def _gathers_heads(layout: str) -> bool:
    """Whether this is a matrix from all heads to the residual stream."""
    dims = parse(layout)
    reads = [dim for dim in dims if dim.reads]
    writes = [dim for dim in dims if not dim.reads]
    return (
        bool(reads)
        and any(kind_of(axis) == HEADS for axis in reads[0].axes)
        and [kind_of(axis) for dim in writes for axis in dim.axes] == [HIDDEN]
    )


@contextmanager
def watched(model: nn.Module, gives: list[str], reads: list[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules give or read while the model runs, by name; the newest if they run again."""
    seen: dict[str, Tensor] = {}

    def given(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(given(name)) for name in gives]
    hooks += [model.get_submodule(name).register_forward_pre_hook(read(name)) for name in reads]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def state_losses(
    names: list[str],
    pairs: Correspondence,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    counted: Tensor | None,
    items: Tensor | int | None = None,
    *,
    decoded: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of these names, each the mean over layers, and over tokens as `token_losses` takes it.

    Args:
        names: In `STATE_LOSSES`.
        pairs: What is compared.
        student: What `watched` saw in the student: [sequences, tokens, channels], by the module's name.
        teacher: What it saw in the teacher; no gradient flows into it.
        counted: [sequences, tokens], False for tokens that are padding; None, or of another shape than the states
            (of sound, which is shortened on the way), for all of them.
        items: As `num_items_in_batch` there; None for the tokens counted here.
        decoded: The same for the decoder of a model that has an encoder besides.
    """
    found = {}
    for name in names:
        means = []
        for pair in pairs.attention if name == "attention_relation" else pairs.layers:
            ours = student[pair.student]
            theirs = pair.seen(teacher[pair.teacher].detach().to(ours.device))
            chosen = decoded if decoded is not None and "decoder" in pair.student.split(".") else counted
            if chosen is None or chosen.shape != ours.shape[:2]:
                chosen = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device)
            count = chosen.sum().clamp(min=1) if items is None else items
            dtype = torch.promote_types(ours.dtype, torch.float32)
            ours, theirs = ours.to(dtype), theirs.to(dtype)
            with torch.autocast(ours.device.type, enabled=False):
                if name == "attention_relation":
                    means.append(STATE_LOSSES[name](ours, theirs, chosen)[chosen].sum() / count)
                else:
                    means.append(STATE_LOSSES[name](ours[chosen], theirs[chosen]).sum() / count)
        found[name] = torch.stack(means).mean()
    return found
