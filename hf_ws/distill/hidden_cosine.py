"""The angle between hidden states, where the plan says that they mean the same."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine: 0 in the same direction, 1 at a right angle.

    Args:
        student: Hidden states [tokens, channels].
        teacher: The teacher's, of the channels that the student's come from.

    Returns:
        [tokens].

    Source: DistilBERT, Sanh et al. 2019 (arXiv 1910.01108), section 2.
    """
    return 1 - cosine_similarity(student, teacher, dim=-1)
