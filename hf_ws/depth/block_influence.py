"""Keep the layers that turn the residual stream most."""

from __future__ import annotations

from hf_ws.depth.context import Context
from hf_ws.errors import CalibrationError


def block_influence(depth: int, keep: int, context: Context) -> tuple[int, ...]:
    """The layers with the highest 1 - cos(input, output), averaged over tokens; of equal ones, the earlier.

    Source: ShortGPT (2403.03853), block influence.

    Raises:
        CalibrationError: a layer whose input and output cannot be compared.
    """
    found = similarity(depth, context, "block_influence")
    return tuple(sorted(sorted(range(depth), key=lambda layer: (found[layer], layer))[:keep]))


block_influence.wants = ("similarity",)  # type: ignore[attr-defined]


def similarity(depth: int, context: Context, policy: str) -> list[float]:
    """The mean cosine of each layer's input and output.

    Raises:
        CalibrationError: of one no input and output of one shape were seen.
    """
    found = context.evidence.similarity
    if blind := [layer for layer in range(depth) if context.key(layer) not in found]:
        raise CalibrationError(
            f"{policy}: of {context.axis} {blind} no input and output of one shape were seen; "
            "name another layer_policy"
        )
    return [found[context.key(layer)] for layer in range(depth)]
