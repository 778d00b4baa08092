"""Skew KL divergence: forward KL against a mixture, whose gradient stays small where the student has no mass."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def skew_kl(log_q: Tensor, log_p: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha x teacher + (1 - alpha) x student), in nats; at most -log(alpha).

    Args:
        log_q: The student's log-probabilities [tokens, outcomes].
        log_p: The teacher's.
        alpha: The teacher's share of the mixture, between 0 and 1, both excluded.

    Returns:
        [tokens].

    Source: DistiLLM, Ko et al. 2024 (arXiv 2402.03898), section 3.1.
    """
    log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
    return (log_p.exp() * (log_p - log_m)).sum(-1)
