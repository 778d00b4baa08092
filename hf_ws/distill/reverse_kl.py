"""Reverse KL divergence: the student keeps to what the teacher thinks likely."""

from __future__ import annotations

from torch import Tensor


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(student || teacher), in nats.

    Args:
        log_q: The student's log-probabilities [tokens, outcomes].
        log_p: The teacher's.

    Returns:
        [tokens].

    Source: MiniLLM, Gu et al. 2023 (arXiv 2306.08543), section 2.1; here on the data's tokens, not on sampled ones.
    """
    return (log_q.exp() * (log_q - log_p)).sum(-1)
