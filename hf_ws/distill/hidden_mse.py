"""Squared difference of hidden states, where the plan says that they mean the same."""

from __future__ import annotations

import torch
from torch import Tensor


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared length of the difference, as a share of the teacher's: 0 at equality, 1 for a student of zeros.

    Args:
        student: Hidden states [tokens, channels].
        teacher: The teacher's, of the channels that the student's come from.

    Returns:
        [tokens].

    Source: TinyBERT, Jiao et al. 2019 (arXiv 1909.10351), equation 8, without its learned matrix (the plan says which
    channels correspond) and relative, so that one weight suits every layer and model.
    """
    length = teacher.square().sum(-1).clamp(min=torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().sum(-1) / length
