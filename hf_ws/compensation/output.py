"""Set the last norm so that the start's predictions come nearest to the source's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ws.axes import VOCAB, kind_of
from hf_ws.compensation.running import Running, plainly_gives, read_by
from hf_ws.errors import CalibrationError
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.layouts.norms import offset_of
from hf_ws.maps import Given
from hf_ws.plan import Plan
from hf_ws.store import Source

TOKENS = 4096
"""How many tokens the fit looks at, evenly spread."""
STEPS = 100
"""How many steps of L-BFGS it takes at most."""
ENOUGH = 1e-6
"""It ends when a step lowers the divergence by less, in nats a token."""
PIECE = 2**23
"""Logits at a time."""
LEAST = 1e-9
"""A fit that lowers the divergence by less, in nats a token, changes nothing."""


def output(
    plan: Plan, source: Source, certificate: Certificate, evidence: Evidence, running: Running
) -> Plan:
    """Fit the gain of the norm that the head reads, and its bias if it has one, to the source's predictions.

    Source and start are run over the calibration data. Of all numbers s, one for each channel, that the gain may be
    multiplied by, and all t that may be added to the bias, those are taken for which the mean divergence KL(source,
    start) over tokens is least. It is convex in s and t, and L-BFGS begins where the gain is, so it is never worse than
    that on the tokens that it looks at. Least squares of the logits has a closed form, and is not what it is good for:
    it makes unsure starts say next to nothing, and takes the demo's rotated start from a loss of 3.35 to 3.47.

    Raises:
        CalibrationError: the head reads no norm, or not the source's words, or there is no data to run.
    """
    student, teacher = running.start(plan), running.observed.model
    norm, head = _last(student, certificate, plan, running)
    reads = [_spread(running, model, head) for model in (teacher, student)]
    module = student.get_submodule(norm)
    bias = getattr(module, "bias", None)
    plain = torch.zeros(len(module.weight)) if bias is None else bias.detach().float().cpu()
    found = _fitted(
        (teacher.get_submodule(head), reads[0]),
        (student.get_submodule(head), reads[1]),
        plain,
        bias is not None,
    )
    if found is None:
        return plan
    with torch.no_grad():
        offset = offset_of(module)
    weight = found[0] * (module.weight.detach().double().cpu() + offset) - offset
    values = {**plan.values, f"{norm}.weight": Given(weight.numpy())}
    if bias is not None:
        values[f"{norm}.bias"] = Given((plain.double() + found[1]).numpy())
    return replace(plan, values=values)


output.wants = ()  # type: ignore[attr-defined]
output.runs = True  # type: ignore[attr-defined]


def _last(
    student: PreTrainedModel, certificate: Certificate, plan: Plan, running: Running
) -> tuple[str, str]:
    """The names of the norm that the head reads, and of the head."""
    if certificate.head is None:
        raise CalibrationError(
            f"output compares the logits of words, and {plan.model_class} gives none; leave it out"
        )
    if any(kind_of(axis) == VOCAB and plan.target_sizes[axis] != n for axis, n in plan.source_sizes.items()):
        raise CalibrationError(
            "output compares logits word by word, and the words are not the same; leave it out"
        )
    head = certificate.head.removesuffix(".weight")
    for model in (running.observed.model, student):
        if not plainly_gives(model, head, running.batch(model)):
            raise CalibrationError(
                f"output takes what {head} gives for the logits, and {plan.model_class} scales or caps it; leave it out"
            )
    norm = read_by(student, head, running.batch(student))
    if norm is None:
        raise CalibrationError(
            f"output sets the gain of the norm that the head reads, and {head} of {plan.model_class} reads none that "
            "has one; leave it out"
        )
    return norm, head


def _spread(running: Running, model: PreTrainedModel, head: str) -> Tensor:
    """What the head reads, of evenly spread tokens: float32 [tokens, channels]."""
    rows = [found[head].float() for found in running.inputs(model, {head})]
    whole = torch.cat(rows)
    return whole[:: -(-len(whole) // TOKENS)]


def _fitted(
    theirs: tuple[nn.Module, Tensor], own: tuple[nn.Module, Tensor], plain: Tensor, shifts: bool
) -> tuple[Tensor, Tensor] | None:
    """What to multiply the last norm's gain by, and what to add to its bias; None if that makes no difference.

    Args:
        theirs: The source's head, and what it reads [tokens, D].
        own: The start's, [tokens, d].
        plain: The bias of the start's last norm [d].
        shifts: Whether it may change.
    """
    by = torch.ones(len(plain), requires_grad=True)
    more = torch.zeros(len(plain), requires_grad=shifts)
    search = torch.optim.LBFGS(
        [by, more] if shifts else [by],
        max_iter=STEPS,
        tolerance_grad=1e-7,
        tolerance_change=ENOUGH,
        line_search_fn="strong_wolfe",
    )
    seen: list[tuple[float, Tensor, Tensor]] = []

    def divergence() -> Tensor:
        search.zero_grad()
        total = torch.zeros(())
        for wanted, read in _pieces(theirs, own[1]):
            given = _head(own[0], by * (read - plain) + plain + more).log_softmax(-1)
            part = (wanted.exp() * (wanted - given)).sum(-1).sum() / len(own[1])
            part.backward()
            total += part.detach()
        seen.append((float(total), by.detach().double(), more.detach().double()))
        return total

    search.step(divergence)
    best = min(seen, key=lambda one: one[0])
    return best[1:] if best[0] < seen[0][0] - LEAST else None


def _pieces(theirs: tuple[nn.Module, Tensor], read: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The source's log-probabilities, and what the start's head reads, a few tokens at a time."""
    words = len(next(theirs[0].parameters()))
    for wide, narrow in zip(*(rows.split(max(1, PIECE // words)) for rows in (theirs[1], read)), strict=True):
        yield _head(theirs[0], wide).log_softmax(-1), narrow


def _head(head: nn.Module, read: Tensor) -> Tensor:
    """Logits, in single precision on the CPU."""
    weight, bias = head.weight, getattr(head, "bias", None)
    assert isinstance(weight, Tensor)
    own = None if bias is None else bias.detach().float().cpu()
    return nn.functional.linear(read, weight.detach().float().cpu(), own)
