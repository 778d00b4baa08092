"""Forward KL divergence from teacher to student on logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ws.errors import DistillationError

# Rows of the vocabulary in float32 at one time: 512 x 128k is 256 MB for each of the few tensors alive.
_CHUNK = 512


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    num_items_in_batch: Tensor | int | None = None,
    chunk: int = _CHUNK,
) -> Tensor:
    """KL(teacher || student) at every counted token, times temperature squared, in nats per token.

    Computed in float32 whatever the logits' dtype, `chunk` tokens at a time, its gradient in the same pass:
    no float32 copy of the logits is ever whole, and the gradient takes the memory of the student's logits.

    Args:
        student_logits: [batch, tokens, vocab].
        teacher_logits: [batch, tokens, vocab], any dtype; no gradient flows into it.
        labels: [batch, tokens], aligned with the logits: position t counts where `labels[:, t] != -100`.
            A causal model predicts the next token, so its labels are shifted by one first.
        temperature: Divides both logits, > 0. The factor temperature ** 2 keeps the gradient's scale.
        num_items_in_batch: The tokens counted in all the micro-batches of one optimizer step, so that their
            losses add up to the mean over that step. None: the tokens counted here.
        chunk: Tokens in float32 at one time.

    Returns:
        A scalar, float32 (float64 for float64 logits); zero if no token counts.

    Raises:
        DistillationError: Shapes that differ, or a temperature that is not positive.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """
    if student_logits.shape != teacher_logits.shape or labels.shape != student_logits.shape[:-1]:
        raise DistillationError(
            f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)} and "
            f"labels {tuple(labels.shape)} do not fit; logits must agree, labels lack only the vocabulary"
        )
    if not temperature > 0:
        raise DistillationError(f"temperature={temperature}; it must be above 0")
    counted = (labels != -100).flatten()
    total = _SumOfKL.apply(
        student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2), counted, temperature, chunk
    )
    items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / items


class _SumOfKL(torch.autograd.Function):
    """The sum over rows, with its gradient taken on the way so that no chunk has to be kept."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            ignored = ~counted[rows, None]
            log_q = (student[rows].to(dtype) / temperature).log_softmax(-1)
            log_p = (teacher[rows].to(student.device, dtype) / temperature).log_softmax(-1)
            p = log_p.exp()
            # A token the teacher rules out (logit -inf) adds nothing; the plain product would be 0 * inf.
            terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
            total += terms.masked_fill_(ignored, 0.0).sum()
            if gradient is not None:
                # d/ds of T^2 KL is T (q - p). Filled, not multiplied: a masked row may hold anything.
                gradient[rows] = (
                    ((log_q.exp() - p) * temperature).masked_fill_(ignored, 0.0).to(student.dtype)
                )
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None, None
