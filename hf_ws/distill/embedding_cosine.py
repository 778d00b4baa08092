"""The teacher's geometry of sentences, whatever the width of the student's embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ws.errors import DistillationError


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over a sentence's tokens, padding left out.

    Args:
        hidden: [sentences, tokens, channels], any dtype.
        attention_mask: [sentences, tokens], 0 where there is padding.

    Returns:
        [sentences, channels], float32 (float64 for float64); zero for a sentence without tokens.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counted = attention_mask.bool().unsqueeze(-1)
    # Filled, not multiplied: padding may hold anything.
    total = hidden.to(dtype).masked_fill(~counted, 0.0).sum(1)
    return total / counted.sum(1).clamp(min=1)


def embedding_cosine(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """KL(teacher || student) of which other sentences of the batch are near each sentence, in nats per sentence.

    Nearness is the softmax of the cosine similarities to all the others, divided by the temperature. Only cosines
    inside each model are compared, so the two widths need not agree, and a rotation of either space changes nothing.
    Computed in float32 whatever the dtypes, also under autocast.

    Args:
        student: Embeddings [sentences, channels], of any length.
        teacher: Embeddings [sentences, channels of the teacher]; no gradient flows into it.
        temperature: Divides the cosines, > 0; the smaller, the more the nearest sentences count.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        DistillationError: Shapes that do not fit, fewer than two sentences, or a temperature that is not positive.

    Source: Passalis and Tefas 2018 (arXiv 1803.10837), equations 2 to 6, with the softmax of SEED (arXiv 2101.04731) as
    the kernel.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 2:
        raise DistillationError(
            f"student embeddings {tuple(student.shape)} and teacher embeddings {tuple(teacher.shape)} do not fit; "
            "wanted are two tables [sentences, channels] of the same two or more sentences"
        )
    if not temperature > 0:
        raise DistillationError(f"temperature={temperature}; it must be above 0")
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        log_q = _log_nearness(student.to(dtype), temperature)
        log_p = _log_nearness(teacher.detach().to(student.device, dtype), temperature)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _log_nearness(embeddings: Tensor, temperature: float) -> Tensor:
    """Log-softmax over the others, [sentences, sentences - 1]: the diagonal is cut out, not masked."""
    directions = normalize(embeddings, dim=-1)
    cosines = directions @ directions.T
    count = len(cosines)
    # Without its first entry the flat matrix has rows of count + 1 that end on the diagonal.
    others = cosines.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)
    return (others / temperature).log_softmax(-1)
