"""Settings under one name. A preset fills what was not given, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "inherited": {"learning_rate": 1e-4, "weight_decay": 1e-3, "schedule": "cosine"},
}
"""`inherited` is for a start with a larger model's weights, which a random start's rates would wash out: what Weight
Subcloning trains GPT-2 with (Samragh et al. 2023, arXiv 2312.09299, table 1; "much smaller" rate and decay are the best
for subcloned nets in its ablations, and worse for random ones). For its vision transformers table 1 has the same rate
and a weight decay of 5e-3. Weight Selection (Xu et al. 2023, arXiv 2311.18823) needs no preset: it trains its starts as
it trains from random."""
