"""The source on the calibration data: run when something is first asked for, and then once for everything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_ws.errors import CalibrationError
from hf_ws.evidence.calibrate import calibrate
from hf_ws.evidence.data import calibration_inputs
from hf_ws.evidence.fingerprint import weights_fingerprint
from hf_ws.evidence.loss import loss_without
from hf_ws.evidence.record import Evidence
from hf_ws.layouts import Certificate, certify
from hf_ws.sizes import sizes_of
from hf_ws.store import Source

logger = logging.getLogger(__name__)


class Observation:
    """What a plan may ask of the data.

    Args:
        model: Gives the source's live model, on the device it is to run on.
        tokenizer: Gives its tokenizer, or None.
        data: Calibration data in any of its forms, or `Evidence` that was collected before.
        wants: What will be asked for, as far as it is known, so that one pass collects it.

    Raises:
        CalibrationError: when something is asked for: what `calibrate` raises, evidence of a model of other sizes or
            without what is wanted, or a loss where there is evidence in place of data.
    """

    def __init__(
        self,
        model: Callable[[], PreTrainedModel],
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        data: Any,
        wants: tuple[str, ...],
    ) -> None:
        self._load, self._tokenizer, self._data, self._wants = model, tokenizer, data, wants
        self._found = data if isinstance(data, Evidence) else None
        self._checked = False
        self._losses: dict[frozenset[int | str], float] = {}

    def evidence(self, wants: tuple[str, ...] = ()) -> Evidence:
        """Evidence with everything that was announced, and with this."""
        if isinstance(self._data, Evidence):
            self._data.require(wants)
            self._check_source(self._data)
            return self._data
        if self._found is None or not {*wants} <= {*self._found.wants}:
            self._wants = (*self._wants, *wants)
            self._found = calibrate(
                self.model, self.batches, certificate=self._certificate, wants=self._wants
            )
        return self._found

    def _check_source(self, evidence: Evidence) -> None:
        if self._checked:
            return
        sizes = sizes_of(self.model.config)
        for (axis, _), values in evidence.items():
            if len(values) != sizes.get(axis):
                raise CalibrationError(
                    f"this evidence is of a model with {axis}={len(values)}, the source has {sizes.get(axis)}; "
                    "calibrate the source"
                )
        of = evidence.fingerprint.get("weights")
        if of is not None and of != weights_fingerprint(self.model):
            logger.warning(
                "calibration= is evidence of other weights than the source's, which may do something else; calibrate "
                "the source"
            )
        self._checked = True

    def loss(self, skipped: Collection[int | str] = ()) -> float:
        """The source's mean loss on the data, in nats, with some layers skipped; run once for each choice."""
        without = frozenset(skipped)
        if without not in self._losses:
            self._losses[without] = loss_without(self.model, self.batches, self._certificate, without)
        return self._losses[without]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The source."""
        return self._load()

    @cached_property
    def _certificate(self) -> Certificate:
        return certify(type(self.model), self.model.config)

    @cached_property
    def batches(self) -> list[Mapping[str, Tensor]]:
        """The data as the model takes it. Raises CalibrationError where there is evidence in its place."""
        if isinstance(self._data, Evidence):
            raise CalibrationError(
                "calibration= is evidence, and here the data itself is needed, to run models on it"
            )
        config = self.model.config
        return [*calibration_inputs(config, self._data, self._tokenizer(), self._certificate)]


def observe(
    source: Source, data: Any, wants: tuple[str, ...], device: torch.device | str | None = None
) -> Observation:
    """An opened source on calibration data, with its own tokenizer; a live source stays on its owner's device."""

    def model() -> PreTrainedModel:
        return source.model() if source.files is None else source.model().to(device or "cpu")

    return Observation(model, partial(tokenizer_of, source), data, wants)


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the source's weights; None if there is none, or it cannot be loaded."""
    if source.files is None or not list(source.files.glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.files, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever keeps it from loading matters only if there are texts to tokenize
        logger.warning("the source's tokenizer cannot be loaded: %s", " ".join(str(error).split()))
        return None
