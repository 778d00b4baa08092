"""Squared difference of logits: every outcome counts alike, however unlikely."""

from __future__ import annotations

from torch import Tensor


def logit_mse(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The mean over outcomes of the squared difference of logits, each model's logits centred.

    Logits mean nothing up to a constant, so each model's mean over the outcomes is taken off first, and
    log-probabilities are as good as logits.

    Args:
        log_q: The student's log-probabilities [tokens, outcomes].
        log_p: The teacher's.

    Returns:
        [tokens], squared nats.

    Source: Ba and Caruana 2014 (arXiv 1312.6184), section 2.2.
    """
    difference = log_q - log_p
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1)
