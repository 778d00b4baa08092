"""What is compared at a token: the whole vocabulary, or the teacher's favourites and the rest as one outcome.

Merging the rest keeps both sides probabilities, so every divergence stays one: zero at equality, never negative, and
never more than on the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = -1e4
"""Stands for log 0: its exponential is 0 in every dtype, and its differences are finite."""


@dataclass(frozen=True)
class Favourites:
    """A teacher's likeliest tokens, as a cache keeps them."""

    ids: Tensor
    """[tokens, k]."""
    log_probs: Tensor
    """[tokens, k], of the whole vocabulary's distribution."""
    rest: Tensor
    """[tokens]: the log-probability that it is any other token."""

    def __getitem__(self, rows: Tensor) -> Favourites:
        return Favourites(self.ids[rows], self.log_probs[rows], self.rest[rows])

    def to(self, device: torch.device) -> Favourites:
        """The same on another device."""
        return Favourites(self.ids.to(device), self.log_probs.to(device), self.rest.to(device))

    @classmethod
    def of(cls, log_p: Tensor, k: int) -> Favourites:
        """The k likeliest of log-probabilities [tokens, vocab]."""
        log_probs, ids = log_p.topk(min(k, log_p.shape[-1]), -1)
        return cls(ids, log_probs, _outside(log_p, ids).clamp(min=FLOOR))


def outcomes(
    log_q: Tensor, teacher: Tensor | Favourites, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's log-probabilities of the outcomes that are compared.

    Args:
        log_q: The student's log-probabilities [tokens, vocab].
        teacher: The teacher's log-probabilities [tokens, vocab], or its favourites.
        top_k: Keep the teacher's k likeliest tokens.
        top_p: Keep its likeliest tokens until they have this probability together, at least one.

    Returns:
        Two tables [tokens, outcomes], the rest last; the whole vocabulary if nothing is left out. None is below
        `FLOOR`.
    """
    if isinstance(teacher, Tensor):
        if top_k is None and top_p is None:
            return log_q.clamp(min=FLOOR), teacher.clamp(min=FLOOR)
        teacher = Favourites.of(teacher, top_k or teacher.shape[-1])
    ids, log_p, rest_p = teacher.ids, teacher.log_probs.to(log_q.dtype), teacher.rest.to(log_q.dtype)
    if top_k is not None:
        rest_p = (
            torch.logaddexp(rest_p, log_p[:, top_k:].clamp(min=FLOOR).logsumexp(-1))
            if top_k < ids.shape[1]
            else rest_p
        )
        ids, log_p = ids[:, :top_k], log_p[:, :top_k]
    kept, rest_q = log_q.gather(-1, ids), _outside(log_q, ids)
    if top_p is not None:
        probabilities = log_p.exp()
        left_out = probabilities.cumsum(-1) - probabilities >= top_p
        rest_p = torch.logaddexp(rest_p, _only(left_out, log_p))
        rest_q = torch.logaddexp(rest_q, _only(left_out, kept))
        log_p, kept = log_p.masked_fill(left_out, FLOOR), kept.masked_fill(left_out, FLOOR)
    return (
        torch.cat([kept, rest_q[:, None]], -1).clamp(min=FLOOR),
        torch.cat([log_p, rest_p[:, None]], -1).clamp(min=FLOOR),
    )


def _outside(log_probs: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of everything but these tokens, [tokens]."""
    return log_probs.clamp(min=FLOOR).scatter(-1, ids, FLOOR).logsumexp(-1)


def _only(chosen: Tensor, log_probs: Tensor) -> Tensor:
    """The log-probability of the chosen outcomes together, [tokens]."""
    return log_probs.clamp(min=FLOOR).masked_fill(~chosen, FLOOR).logsumexp(-1)
