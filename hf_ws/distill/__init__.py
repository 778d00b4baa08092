"""Distillation: one file per loss, and the teacher.

A loss is a function of the two models' logits and the labels, in nats per token. To add one, write
`distill/<name>.py` and list it here; its contract (zero at equality, masked tokens inert, no gradient to the
teacher) is tested over every row.

`embedding_cosine` is for encoders: a function of two tables of sentence embeddings, so no row of that table.
"""

from hf_ws.distill.embedding_cosine import embedding_cosine, mean_pool
from hf_ws.distill.forward_kl import forward_kl

LOSSES = {"forward_kl": forward_kl}

__all__ = ["LOSSES", "embedding_cosine", "forward_kl", "mean_pool"]
