"""Total variation distance: the probability on which the two models disagree."""

from __future__ import annotations

from torch import Tensor


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Half the sum of absolute differences, from 0 to 1.

    Args:
        log_q: The student's log-probabilities [tokens, outcomes].
        log_p: The teacher's.

    Returns:
        [tokens].

    Source: f-DISTILL, Wen et al. 2023 (arXiv 2307.15190), section 3.
    """
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)
