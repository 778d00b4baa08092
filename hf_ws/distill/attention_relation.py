"""How the tokens of a sequence relate in what attention gives them, whatever the widths of the two models."""

from __future__ import annotations

import math

from torch import Tensor


def attention_relation(student: Tensor, teacher: Tensor, counted: Tensor, *, relations: int = 8) -> Tensor:
    """KL of the teacher's relations between tokens from the student's, in nats, the mean over relations.

    A relation is the softmax of scaled dot products between tokens, in one of several equal parts of what the output
    projection of attention reads. Takes [relations, tokens, tokens] in float32 for each sequence.

    Args:
        student: What the projection reads [sequences, tokens, width].
        teacher: The same of the teacher, of any width.
        counted: [sequences, tokens], False for tokens that nothing is compared with.
        relations: Parts that either width is cut into, or the largest number below that divides both.

    Returns:
        [sequences, tokens].

    Source: MiniLMv2, Wang et al. 2020 (arXiv 2012.15828), section 3.1, with attention's output in place of values.
    """
    common = math.gcd(student.shape[-1], teacher.shape[-1])
    relations = max(n for n in range(1, relations + 1) if common % n == 0)
    log_q, log_p = (_log_relations(states, counted, relations) for states in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)


def _log_relations(states: Tensor, counted: Tensor, relations: int) -> Tensor:
    """[sequences, relations, tokens, tokens]."""
    parts = states.unflatten(-1, (relations, -1)).transpose(1, 2)
    products = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
    return products.masked_fill(~counted[:, None, None, :], -1e4).log_softmax(-1)
