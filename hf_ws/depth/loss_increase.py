"""Drop, one after the other, the layer that is missed least."""

from __future__ import annotations

from tqdm import tqdm

from hf_ws.depth.context import Context


def loss_increase(depth: int, keep: int, context: Context) -> tuple[int, ...]:
    """Greedy: until `keep` layers are left, drop the one without which the loss on the calibration data is lowest.

    Each step runs the data once for every layer that is left: some (depth^2 - keep^2) / 2 passes in all. Of equal
    losses, the earlier layer goes.

    Source: SLEB (2402.09025), which drops one block after the other; Shortened LLaMA (2402.02834) ranks once.
    """
    kept = list(range(depth))
    for _ in tqdm(range(depth - keep), desc="skipping layers", delay=2):
        without = {layer: context.loss({*range(depth)} - {*kept} | {layer}) for layer in kept}
        kept.remove(min(kept, key=lambda layer: (without[layer], layer)))
    return tuple(kept)


loss_increase.wants = ()  # type: ignore[attr-defined]
