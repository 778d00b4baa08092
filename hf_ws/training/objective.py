"""What a training step minimises: cross-entropy, and what separates the student from its teacher.

    loss = (1 - w) x cross-entropy + w x (the sum of weight x loss over `kd_losses`)

The weights may move over the run. Logits are made for a chunk of tokens at a time, inside the model's own forward pass,
so that whatever shards or wraps the model sees an ordinary one.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_ws.distill import STATE_LOSSES, Favourites, Head, head, states, token_losses
from hf_ws.distill.tokens import CROSS_ENTROPY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_ws.plan import Plan
    from hf_ws.training.config import TrainConfig, Weight

logger = logging.getLogger(__name__)


@dataclass
class Taught:
    """What a teacher says of a batch."""

    tokens: Tensor | Favourites | None = None
    """Its logits, or what its head reads, or its cached favourites."""
    head: Head | None = None
    seen: Mapping[str, Tensor] | None = None
    """Its inner states, by the module's name."""


class Objective:
    """The loss of a batch, and its parts.

    Args:
        config: Names the losses, their weights and settings.
        student: Not wrapped by anything yet; in the dtype and on the device that the teacher's states come to.
        teacher: In eval mode; None for cross-entropy alone, or where the batches bring a cache.
        plan: Of the student, where inner states are compared.
        shifts: Whether position t predicts label t + 1, as causal models do.
        batch: A small batch to see on whether the head can be taken apart.
        for_teacher: Makes the teacher's inputs of the student's.

    Raises:
        DistillationError: Inner states that cannot be compared.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        plan: Plan | None = None,
        *,
        shifts: bool = True,
        batch: Mapping[str, Tensor],
        for_teacher: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self.config, self.student, self.teacher, self.shifts = config, student, teacher, shifts
        self.for_teacher = for_teacher
        self.states = [name for name in config.kd_losses if name in STATE_LOSSES]
        self.vocabulary = _common_ids(student, teacher)
        self.pairs = None
        if teacher is not None and self.states:
            self.pairs = states.Correspondence.of(student, teacher, plan)
        self._accepted = set(inspect.signature(teacher.forward).parameters) if teacher else set[str]()
        self.apart = head.is_known(student, _inputs(batch))
        self.teacher_apart = teacher is not None and head.is_known(teacher, self._for_teacher(_inputs(batch)))
        for model, known in ((student, self.apart), (teacher, self.teacher_apart)):
            if model is not None and not known and model.get_output_embeddings() is not None:
                logger.warning(
                    "%s makes its logits in a way of its own: they are made whole", type(model).__name__
                )

    def __call__(
        self,
        model: Any,
        batch: Mapping[str, Any],
        *,
        progress: float | None = None,
        items: Tensor | int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """The loss, its parts by name, and the model's outputs.

        Args:
            model: The student as it is wrapped for training.
            batch: What the model takes, and `labels`; `soft_labels` [images, classes] in place of these for the
                cross-entropy that is trained; of a cache also `teacher_ids`, `teacher_log_probs`,
                `teacher_rest`.
            progress: How much of the run is over, 0 to 1; None to evaluate, which is cross-entropy alone.
            items: The labels counted in all the batches of an optimizer step; None for those of this one.
        """
        labels, inputs = batch["labels"], _inputs(batch)
        targets = pad(labels[:, 1:], (0, 1), value=-100) if self.shifts else labels
        cached = "teacher_ids" in batch
        distils = progress is not None and (self.teacher is not None or cached)
        weights = self.weights(progress or 0.0) if distils else {CROSS_ENTROPY: 1.0}
        asked = [name for name in self.states if weights.get(name)] if self.pairs else []
        taught = Taught()
        if cached and distils:
            taught.tokens = Favourites(
                *(batch[f"teacher_{n}"].flatten(0, 1) for n in ("ids", "log_probs", "rest"))
            )
        elif distils:
            taught = self._ask_teacher(inputs, asked)
        with ExitStack() as stack:
            seen = stack.enter_context(states.watched(self.student, *self._modules("student", asked)))
            soft = batch.get("soft_labels") if progress is not None else None
            outputs, (loss, parts) = self._forward(model, inputs, targets, taught, weights, items, soft)
        if asked and self.pairs and taught.seen is not None:
            counted = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            decoded = targets != -100 if "decoder_input_ids" in inputs else None
            found = states.state_losses(asked, self.pairs, seen, taught.seen, counted, decoded=decoded)
            share = (
                1.0 if items is None else (targets != -100).sum() / items
            )  # of the step's tokens, as the rest has
            parts |= {name: value * share for name, value in found.items()}
            loss = loss + sum(weights[name] * parts[name] for name in asked)
        auxiliary = getattr(outputs, "aux_loss", None)
        if progress is not None and isinstance(
            auxiliary, Tensor
        ):  # of a router, which asks for balanced experts
            loss = loss + self.student.config.get_text_config().router_aux_loss_coef * auxiliary.to(
                loss.device
            )
        return loss, self._report(parts, progress) if distils else parts, outputs

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of every loss at this part of the run, cross-entropy among them."""
        share = at(self.config.kd_weight, progress)
        return {CROSS_ENTROPY: 1 - share} | {
            name: share * at(weight, progress) for name, weight in self.config.kd_losses.items()
        }

    def _report(self, parts: dict[str, Tensor], progress: float | None) -> dict[str, Tensor]:
        """`ce_loss`, `kd_loss` as it is weighted against that, and each loss by its name where there are several."""
        report = {"ce_loss": parts[CROSS_ENTROPY]} if CROSS_ENTROPY in parts else {}
        own = {name: parts[name].detach() for name in self.config.kd_losses if name in parts}
        if own:
            weights = self.config.kd_losses
            report["kd_loss"] = sum(
                (at(weights[name], progress or 0.0) * value for name, value in own.items()), torch.zeros(())
            )
        return report | (own if len(own) > 1 else {})

    def _forward(
        self,
        model: Any,
        inputs: dict[str, Any],
        targets: Tensor,
        taught: Taught,
        weights: Mapping[str, float],
        items: Tensor | int | None,
        soft: Tensor | None,
    ) -> tuple[Any, tuple[Tensor, dict[str, Tensor]]]:
        """The model's outputs, and the losses over its vocabulary."""
        config = self.config
        options: dict[str, Any] = {
            "weights": {name: value for name, value in weights.items() if name not in STATE_LOSSES},
            "temperature": config.kd_temperature,
            "top_k": config.kd_top_k,
            "top_p": config.kd_top_p,
            "vocabulary": self.vocabulary,
            "num_items_in_batch": items,
            "options": {"jensen_shannon": {"beta": config.kd_beta}, "skew_kl": {"alpha": config.kd_alpha}},
            "teacher_head": taught.head,
        }
        if soft is not None:
            outputs = model(**inputs)
            share = options["weights"].pop(CROSS_ENTROPY, 0.0)
            loss, parts = token_losses(outputs.logits, targets, taught.tokens, **options)
            own = -(soft * outputs.logits.float().log_softmax(-1)).sum() / (items or len(soft))
            return outputs, (loss + share * own, {CROSS_ENTROPY: own.detach()} | parts)
        if not self.apart:
            outputs = model(**inputs)
            return outputs, token_losses(outputs.logits, targets, taught.tokens, **options)
        found = []

        def reads(hidden: Tensor) -> None:
            found.append(
                token_losses(
                    hidden, targets, taught.tokens, student_head=head.head_of(self.student), **options
                )
            )

        with head.beheaded(self.student, reads):
            outputs = model(**inputs)
        loss, parts = found[0]
        # The backward pass has to come through what the model gave, where engines hang their hooks.
        return outputs, (loss + 0.0 * outputs.logits.sum(), parts)

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Any], asked: list[str]) -> Taught:
        teacher = self.teacher
        assert teacher is not None
        inputs = {
            name: value.to(teacher.device) if isinstance(value, Tensor) else value
            for name, value in self._for_teacher(inputs).items()
        }
        with states.watched(teacher, *self._modules("teacher", asked)) as seen:
            if not self.teacher_apart:
                return Taught(teacher(**inputs).logits, None, seen)
            read: list[Tensor] = []
            with head.beheaded(teacher, read.append):
                teacher(**inputs)
        return Taught(read[0], head.head_of(teacher), seen)

    def _for_teacher(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        inputs = self.for_teacher(dict(inputs))
        return {name: value for name, value in inputs.items() if name in self._accepted}

    def _modules(self, side: str, asked: list[str]) -> tuple[list[str], list[str]]:
        """The modules whose outputs, and whose inputs, these losses compare."""
        if not asked or self.pairs is None:
            return [], []
        layers = self.pairs.layers if set(asked) - {"attention_relation"} else ()
        attention = self.pairs.attention if "attention_relation" in asked else ()
        return [getattr(pair, side) for pair in layers], [getattr(pair, side) for pair in attention]


def at(weight: Weight, progress: float) -> float:
    """A weight at a part of the run; of a pair, on the way from the first to the second."""
    if not isinstance(weight, list):
        return float(weight)
    start, end = weight
    return start + (end - start) * progress


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what is no input of the model."""
    aside = ("labels", "soft_labels")
    inputs = {
        name: value for name, value in batch.items() if name not in aside and not name.startswith("teacher_")
    }
    # Only what reads tokens keeps a cache, and other models may not know the word.
    return inputs | ({"use_cache": False} if {"input_ids", "decoder_input_ids"} & {*inputs} else {})


def _common_ids(student: PreTrainedModel, teacher: PreTrainedModel | None) -> int | None:
    """How many ids both have, where one table is longer."""
    if teacher is None:
        return None
    sizes = {
        len(module.weight)
        for model in (student, teacher)
        if (module := model.get_output_embeddings()) is not None
    }
    return min(sizes) if len(sizes) > 1 else None
