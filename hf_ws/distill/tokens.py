"""Losses over a vocabulary, summed over tokens in chunks: no float32 table [tokens, vocab] is ever whole.

    total, parts = token_losses(
        logits, labels, teacher_logits, weights={"cross_entropy": 0.5, "forward_kl": 0.5}, temperature=2.0
    )

Either side may come as what its head reads, with the head: then its logits exist for one chunk at a time, in whatever
dtype, and the gradients of hidden states and head are taken on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, nll_loss

from hf_ws.distill.forward_kl import forward_kl
from hf_ws.distill.jensen_shannon import jensen_shannon
from hf_ws.distill.logit_mse import logit_mse
from hf_ws.distill.outcomes import Favourites, outcomes
from hf_ws.distill.reverse_kl import reverse_kl
from hf_ws.distill.skew_kl import skew_kl
from hf_ws.distill.total_variation import total_variation
from hf_ws.errors import DistillationError

LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
    "total_variation": total_variation,
    "logit_mse": logit_mse,
}
"""Functions of the student's and the teacher's log-probabilities [tokens, outcomes], per token."""

CROSS_ENTROPY = "cross_entropy"

WHOLE = ("logit_mse",)
"""Losses that are none on merged outcomes."""

_ENTRIES = 2**25
"""Of a table in float32 at one time, where no other chunk is asked for: 128 MB for each of the few tables alive."""


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: cap x tanh(scale x (weight @ hidden + bias) / cap)."""

    weight: Tensor
    """[vocab, channels]."""
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def product(self, hidden: Tensor) -> Tensor:
        """What the matrix makes of hidden states [tokens, channels], in the weight's dtype."""
        return linear(hidden.to(self.weight.device, self.weight.dtype), self.weight, self.bias)

    def logits(self, product: Tensor) -> Tensor:
        """What comes after the matrix."""
        scaled = product if self.scale == 1.0 else product * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def at_work(self) -> Head:
        """The head in the dtype that a product has here: autocast's if that is on, cast once and not for each chunk."""
        device = self.weight.device.type
        if not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, weight=self.weight.detach().to(dtype), bias=bias)


def token_losses(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | Favourites | None = None,
    *,
    weights: Mapping[str, float],
    student_head: Head | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocabulary: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of losses at every counted token, and each of them alone, in nats per token.

    Computed in float32 whatever the dtypes (float64 for float64), a chunk of tokens at a time, gradients on the way.

    Args:
        student: Logits [..., vocab], or hidden states [..., channels] with a `student_head`.
        labels: [...]: a position counts where its label is not -100. A causal model predicts the next token, so its
            labels are shifted by one first.
        teacher: Logits, or hidden states with a `teacher_head`, for the same positions; or its favourites, a row for
            every position. No gradient flows into it.
        weights: Of `cross_entropy` and of losses in `LOSSES`; what weighs nothing is not computed.
        student_head: Makes the student's logits of its hidden states.
        teacher_head: Makes the teacher's.
        temperature: Divides both models' logits in the losses of `LOSSES`, > 0; these are multiplied by its square,
            which keeps their gradients' scale (Hinton et al. 2015, section 2). Favourites were chosen at theirs.
        top_k: Compare the teacher's k likeliest tokens, and all the rest as one outcome.
        top_p: Compare its likeliest tokens up to this probability, and all the rest as one outcome.
        vocabulary: Compare the models on the first so many ids, where the longer table is the other one padded.
        num_items_in_batch: The tokens counted in all the micro-batches of one optimizer step, so that their losses add
            up to the mean over that step. None: the tokens counted here.
        options: Keyword arguments of losses, by name.
        chunk: Tokens in float32 at one time; by default as many as keep a table at 128 MB.

    Returns:
        A scalar with gradient, and scalars without; zero if no token counts.

    Raises:
        DistillationError: Shapes that do not fit, an unknown loss, a loss that wants a teacher without one, or a
            setting out of its range.
    """
    weights = {name: float(weight) for name, weight in weights.items() if weight}
    objective = _Objective(weights, temperature, top_k, top_p, vocabulary, options or {})
    objective.check(student, labels, teacher, student_head, teacher_head)
    if not weights:
        return student.new_zeros(()), {}
    rows = student.reshape(-1, student.shape[-1])
    chunk = chunk or max(1, _ENTRIES // (len(student_head.weight) if student_head else rows.shape[-1]))
    taught = teacher.detach().reshape(-1, teacher.shape[-1]) if isinstance(teacher, Tensor) else teacher
    own = (None, None) if student_head is None else (student_head.weight, student_head.bias)
    sums = _Sums.apply(objective, chunk, labels.reshape(-1), taught, student_head, teacher_head, rows, *own)
    items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    total, *parts = (value / items for value in sums)
    return total, dict(zip(weights, parts, strict=True))


@dataclass(frozen=True)
class _Objective:
    """What is computed of a chunk of tokens."""

    weights: Mapping[str, float]
    temperature: float
    top_k: int | None
    top_p: float | None
    vocabulary: int | None
    options: Mapping[str, Mapping[str, Any]]

    def __call__(self, logits: Tensor, labels: Tensor, taught: Tensor | Favourites | None) -> Tensor:
        """The sum of each loss over these tokens, given both models' logits [tokens, vocab]."""
        log_q, found = logits.log_softmax(-1), {}
        if CROSS_ENTROPY in self.weights:
            found[CROSS_ENTROPY] = nll_loss(log_q, labels, reduction="sum")
        if taught is not None:
            if isinstance(taught, Tensor):
                taught = (taught[:, : self.vocabulary] / self.temperature).log_softmax(-1)
            if self.temperature != 1.0 or self.vocabulary is not None:
                log_q = (logits[:, : self.vocabulary] / self.temperature).log_softmax(-1)
            compared = outcomes(log_q, taught, self.top_k, self.top_p)
            for name in self.weights.keys() - {CROSS_ENTROPY}:
                per_token = LOSSES[name](*compared, **self.options.get(name, {}))
                found[name] = per_token.sum() * self.temperature**2
        return torch.stack([found[name] for name in self.weights])

    def check(
        self,
        student: Tensor,
        labels: Tensor,
        teacher: Tensor | Favourites | None,
        student_head: Head | None,
        teacher_head: Head | None,
    ) -> None:
        """Refuse what does not fit."""
        asked = self.weights.keys() - {CROSS_ENTROPY}
        if unknown := asked - LOSSES.keys():
            raise DistillationError(
                f"no loss is called {', '.join(sorted(unknown))}; there are {', '.join(LOSSES)}"
            )
        if asked and teacher is None:
            raise DistillationError(f"{', '.join(sorted(asked))} compare with a teacher, and there is none")
        if not self.temperature > 0:
            raise DistillationError(f"temperature={self.temperature}; it must be above 0")
        if (self.top_k is not None and self.top_k < 1) or not 0 < (
            1.0 if self.top_p is None else self.top_p
        ) <= 1:
            raise DistillationError(
                f"top_k={self.top_k}, top_p={self.top_p}; at least 1, and above 0 up to 1"
            )
        merged = isinstance(teacher, Favourites) or self.top_k is not None or self.top_p is not None
        if merged and (whole := asked & set(WHOLE)):
            raise DistillationError(
                f"{', '.join(whole)} compares all logits; leave out top_k, top_p and a teacher's cache"
            )
        sizes = [
            made.shape[-1] if head is None else len(head.weight)
            for made, head in ((student, student_head), (teacher, teacher_head))
            if isinstance(made, Tensor)
        ]
        before = teacher.shape[:-1] if isinstance(teacher, Tensor) else labels.shape
        if (
            labels.shape != student.shape[:-1]
            or before != labels.shape
            or len({min(n, self.vocabulary or n) for n in sizes}) > 1
        ):
            came = [tuple(made.shape) for made in (student, teacher, labels) if isinstance(made, Tensor)]
            raise DistillationError(
                f"student, teacher and labels of shapes {', '.join(map(str, came))}, of vocabularies "
                f"{' and '.join(map(str, sizes))}, do not fit; they must agree, and labels lack the last dimension"
            )


class _Sums(torch.autograd.Function):
    """The sums over tokens, with their gradients taken on the way so that no chunk has to be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        objective: _Objective,
        chunk: int,
        labels: Tensor,
        teacher: Tensor | Favourites | None,
        student_head: Head | None,
        teacher_head: Head | None,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype, device = torch.promote_types(rows.dtype, torch.float32), rows.device
        head = student_head and student_head.at_work()
        teacher_head = teacher_head and teacher_head.at_work()
        sums = torch.zeros(len(objective.weights), dtype=dtype, device=device)
        factors = torch.tensor(list(objective.weights.values()), dtype=dtype, device=device)
        leaves = (rows, weight, bias)
        gradients = [
            torch.zeros_like(leaf) if need and leaf is not None else None
            for leaf, need in zip(leaves, ctx.needs_input_grad[6:], strict=True)
        ]
        with torch.autocast(device.type, enabled=False):
            for own in (labels.to(device) != -100).nonzero().squeeze(-1).split(chunk):
                hidden = rows[own]
                product = (hidden if head is None else head.product(hidden)).detach()
                taught = _logits(teacher, teacher_head, own, dtype, device)
                with torch.enable_grad():
                    product.requires_grad_(any(ctx.needs_input_grad))
                    logits = product if head is None else head.logits(product)
                    values = objective(logits.to(dtype), labels.to(device)[own], taught)
                    total = values @ factors
                sums += values.detach()
                if product.requires_grad:
                    (slope,) = torch.autograd.grad(total, product)
                    _add(gradients, slope, own, hidden, head)
        ctx.save_for_backward(*gradients)
        parts = tuple(sums.unbind())
        ctx.mark_non_differentiable(*parts)
        return ((sums * factors).sum(), *parts)  # no product of vectors, which autocast would do in bf16

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else gradient * slope.to(gradient.dtype)
            for gradient in ctx.saved_tensors
        )
        return (*(None,) * 6, *scaled)


def _logits(
    teacher: Tensor | Favourites | None,
    head: Head | None,
    own: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | Favourites | None:
    """What the teacher says at these tokens, where the student is."""
    if teacher is None:
        return None
    if isinstance(teacher, Favourites):
        return teacher[own.to(teacher.ids.device)].to(device)
    rows = teacher[own.to(teacher.device)]
    return (rows if head is None else head.logits(head.product(rows))).to(device, dtype)


def _add(
    gradients: list[Tensor | None], slope: Tensor, own: Tensor, hidden: Tensor, head: Head | None
) -> None:
    """Add a chunk's gradients of rows, weight and bias, given that of the head's product."""
    of_rows, of_weight, of_bias = gradients
    if of_rows is not None:
        of_rows[own] = (slope if head is None else slope @ head.weight.detach()).to(of_rows.dtype)
    if of_weight is not None:
        if of_weight.dtype == slope.dtype:
            of_weight.addmm_(slope.T, hidden.to(slope.dtype))  # no matrix of the weight's size beside it
        else:
            of_weight += slope.T @ hidden.to(slope.dtype)
    if of_bias is not None:
        of_bias += slope.sum(0)
