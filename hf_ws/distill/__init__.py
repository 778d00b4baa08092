"""Distillation: one file per loss, and the teacher.

A loss over the vocabulary is a function of the two models' log-probabilities, in nats per token; `token_losses` sums
any of them over tokens. To add one, write `distill/<name>.py` and list it in `LOSSES`; its contract (zero at equality,
masked tokens inert, no gradient to the teacher) is tested over every row.

Losses of inner states (`STATE_LOSSES`) compare what the student's plan says corresponds. `embedding_cosine` is for
encoders: a function of two tables of sentence embeddings, so no row of either table.
"""

from hf_ws.distill.embedding_cosine import embedding_cosine, mean_pool
from hf_ws.distill.outcomes import Favourites
from hf_ws.distill.states import STATE_LOSSES
from hf_ws.distill.tokens import LOSSES, Head, token_losses

__all__ = ["LOSSES", "STATE_LOSSES", "Favourites", "Head", "embedding_cosine", "mean_pool", "token_losses"]
