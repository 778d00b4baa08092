"""Generalised Jensen-Shannon divergence: between the forward and the reverse KL, and bounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def jensen_shannon(log_q: Tensor, log_p: Tensor, *, beta: float = 0.5) -> Tensor:
    """Of both models from their mixture m = beta x teacher + (1 - beta) x student, in nats.

    It is beta x KL(teacher || m) + (1 - beta) x KL(student || m). Divided by beta it tends to the forward KL as beta
    goes to 0; divided by 1 - beta, to the reverse KL as beta goes to 1.

    Args:
        log_q: The student's log-probabilities [tokens, outcomes].
        log_p: The teacher's.
        beta: Between 0 and 1, both excluded.

    Returns:
        [tokens].

    Source: GKD, Agarwal et al. 2023 (arXiv 2306.13649), section 2.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * teacher + (1 - beta) * student
