"""Set the last norm so that the start's logits come nearest to the source's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.axes import VOCAB, kind_of
from hf_ws.compensation.running import Running, read_by
from hf_ws.errors import CalibrationError
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.layouts.norms import offset_of
from hf_ws.maps import Given
from hf_ws.plan import Plan
from hf_ws.store import Source

RIDGE = 1e-3
"""How hard the gains are held where they are, as a share of the mean of what they are fitted by."""
NOTHING = 1e-10
"""A fit that takes less than this share off what is to be explained changes nothing."""


def output(
    plan: Plan, source: Source, certificate: Certificate, evidence: Evidence, running: Running
) -> Plan:
    """The gain of the norm that the head reads, and its bias if it has one, by least squares of the logits.

    The start is run over the calibration data. Of all gains for single channels those are taken with which its logits
    differ least, in the mean of squares over tokens and words, from those of the source, of which each token's mean
    over words does not count. There is a closed form: logits are H (s u + b), u the norm's output without its bias,
    and so linear in s and b. A small penalty holds s near one, so the fit is never worse than what was there.

    What is done after it sees another stream: name it last.

    Raises:
        CalibrationError: the head reads no norm, or not the source's words, or there is no data to run.
    """
    student, teacher = running.start(plan), running.observed.model
    norm, head = _last(student, certificate, plan, running)
    mean, second = _moments(running, student, teacher, head)
    module = student.get_submodule(norm)
    bias = getattr(module, "bias", None)
    shift = None if bias is None else bias.detach().double().cpu()
    found = calibrated(_centred(student, head), _centred(teacher, head), mean, second, shift)
    if found is None:
        return plan
    with torch.no_grad():
        offset = offset_of(module)
    weight = found[0] * (module.weight.detach().double().cpu() + offset) - offset
    values = {**plan.values, f"{norm}.weight": Given(weight.numpy())}
    if shift is not None and found[1] is not None:
        values[f"{norm}.bias"] = Given((shift + found[1]).numpy())
    return replace(plan, values=values)


output.wants = ()  # type: ignore[attr-defined]
output.runs = True  # type: ignore[attr-defined]


def _last(
    student: PreTrainedModel, certificate: Certificate, plan: Plan, running: Running
) -> tuple[str, str]:
    """The names of the norm that the head reads, and of the head."""
    if certificate.head is None:
        raise CalibrationError(f"output compares logits, and {plan.model_class} gives none; leave it out")
    if any(kind_of(axis) == VOCAB and plan.target_sizes[axis] != n for axis, n in plan.source_sizes.items()):
        raise CalibrationError(
            "output compares logits word by word, and the words are not the same; leave it out"
        )
    head = certificate.head.removesuffix(".weight")
    norm = read_by(student, head, running.batch(student))
    if norm is None:
        raise CalibrationError(
            f"output sets the gain of the norm that the head reads, and {head} of {plan.model_class} reads none that "
            "has one; leave it out"
        )
    return norm, head


def _moments(
    running: Running, student: PreTrainedModel, teacher: PreTrainedModel, head: str
) -> tuple[Tensor, Tensor]:
    """Mean [n] and second moments [n, n] of what the heads of the source and of the start read, side by side."""
    count, first, second = 0, torch.zeros(()), torch.zeros(())
    for theirs, own in zip(running.inputs(teacher, {head}), running.inputs(student, {head}), strict=True):
        both = torch.cat([theirs[head], own[head]], 1)
        count, first, second = count + len(both), first + both.sum(0), second + both.T @ both
    return first / count, second / count


def _centred(model: PreTrainedModel, head: str) -> Tensor:
    """The head's matrix [words, channels], less its mean over words."""
    weight = model.get_submodule(head).weight.detach().double().cpu()
    return weight - weight.mean(0)


def calibrated(
    own: Tensor, theirs: Tensor, mean: Tensor, second: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """What to multiply the last norm's gain by, and what to add to its bias; None if that makes no difference.

    Args:
        own: The start's head [words, d], less its mean over words.
        theirs: The source's [words, D].
        mean: Of what the heads read, the source's and then the start's: [D + d].
        second: Its second moments [D + d, D + d].
        bias: Of the start's last norm [d], if it has one.
    """
    wide = theirs.shape[1]
    inner, across = own.T @ own, own.T @ theirs
    plain = torch.zeros_like(mean[wide:]) if bias is None else bias
    without = mean[wide:] - plain
    with_source = second[:wide, wide:] - mean[:wide, None] * plain
    with_own = second[wide:, wide:] - mean[wide:, None] * plain
    squares = with_own - plain[:, None] * without
    normal = inner * squares
    wanted = (across * with_source.T).sum(1) - (inner * with_own.T).sum(1)
    penalty = normal.diagonal().mean().expand(len(normal))
    if bias is not None:
        corner = without[:, None] * inner
        normal = torch.cat([torch.cat([normal, corner], 1), torch.cat([corner.T, inner], 1)])
        wanted = torch.cat([wanted, across @ mean[:wide] - inner @ mean[wide:]])
        penalty = torch.cat([penalty, inner.diagonal().mean().expand(len(inner))])
    found = torch.linalg.solve(normal + RIDGE * penalty.diag(), wanted)
    whole = float((theirs.T @ theirs * second[:wide, :wide]).sum())
    if not float(2 * found @ wanted - found @ normal @ found) > NOTHING * whole:
        return None
    return 1 + found[: len(plain)], None if bias is None else found[len(plain) :]
