"""Weight subcloning: keep the most important channels, neurons and heads, and rescale what reads them."""

from __future__ import annotations

from collections.abc import Collection

from hf_ws.axes import EXPERTS, FFN, HEADS, HIDDEN, KV_HEADS, kind_of
from hf_ws.maps import DATA_FREE, AxisMap, Gather, Rank
from hf_ws.methods.kv import merged
from hf_ws.methods.request import Request
from hf_ws.plan import Plan
from hf_ws.scores import Score, score_of

SEEN = (HIDDEN, FFN, KV_HEADS, HEADS, EXPERTS)
"""The axes whose activations, or routes, calibration sees."""


def subclone(
    request: Request,
    *,
    rescale: bool = True,
    score: str | Score | None = None,
    kv_merge: str | None = None,
) -> Plan:
    """Importance ranking: one order for the residual stream, one order per layer for neurons, heads and experts.

    Source: Weight Subcloning (2312.09299), section 3. Whole heads move, and query heads only with their kv head.
    The paper scales by sqrt(d / d'); we use each matrix's own fan-in, which is the same when all axes shrink alike.
    Of a tied head, which the paper does not mention, the gain goes to the final norm. Heads with ALiBi slopes are not
    ranked, since another place would give them another slope: those are kept whose slopes the target has.

    Args:
        request: What is asked.
        rescale: Multiply every matrix by sqrt(fan-in of the source / fan-in of the target), and the embedding so where
            the class multiplies it by sqrt(hidden).
        score: A name in `SCORES`, or a score itself; mean absolute activation where there is calibration data, else
            weight magnitude. Inside fused experts and factorised embeddings no activation can be seen: they go by
            magnitude.
        kv_merge: `"least_squares"` makes each key/value head stand for neighbours, `"mean"` takes their mean
            (2305.13245); None selects.

    Raises:
        PlanError: an unknown score or merge.
        SizeError: query heads that no selection of whole kv groups gives.
    """
    means = merged(request, kv_merge) if kv_merge else {}
    taken = {key.partition("@")[0] for key in means}
    request.check_heads(but=taken)
    maps = ranked_maps(request, score, taken) | means
    gains = request.fan_in_gains() | request.embedding_gains() if rescale else {}
    return request.plan(maps, gains=gains)


def ranked_maps(
    request: Request, score: str | Score | None, given: Collection[str] = ()
) -> dict[str, AxisMap]:
    """The maps of every axis but the `given` ones: the highest by a score, where a method may choose."""
    if score is not None:
        score_of(score)
    by = score or ("activation" if request.calibrated else "magnitude")
    before, after = request.before, request.after
    maps = request.fixed_maps()

    def ranked(axis: str) -> AxisMap:
        if before[axis] == after[axis]:
            return Gather(tuple(range(after[axis])), before[axis])
        blind = isinstance(by, str) and by not in DATA_FREE and kind_of(axis) not in SEEN
        return Rank(after[axis], before[axis], "magnitude" if blind else by)

    for axis in (axis for axis in request.axes if axis not in maps and axis not in given):
        maps |= dict.fromkeys(request.places(axis), ranked(axis))
    return maps


subclone.layer_policy = "middle_dropped"  # type: ignore[attr-defined]
subclone.wants = ("mean_abs", "routes")  # type: ignore[attr-defined]
