"""Forward KL divergence: the student covers everything that the teacher allows."""

from __future__ import annotations

from torch import Tensor


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(teacher || student), in nats.

    Args:
        log_q: The student's log-probabilities [tokens, outcomes].
        log_p: The teacher's.

    Returns:
        [tokens].

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
