"""What a family's miniature needs that no rule gives: data, by model type.

`FIELDS` are config fields of one config of the tree, whichever model it is a part of: a value, one for `Each` of the
two miniatures, or a function of that config; `INPUTS` makes what a model is called with. Most families need
neither: see `hf_ws.layouts.miniature`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.layouts.zoo import audio, multimodal, multimodal_inputs, text, vision
from hf_ws.layouts.zoo.draw import Each, Open

Inputs = Callable[[PreTrainedModel], Mapping[str, Tensor]]

FIELDS: Mapping[str, Mapping[str, Any]] = text.FIELDS | vision.FIELDS | audio.FIELDS | multimodal.FIELDS
INPUTS: Mapping[str, Inputs] = text.INPUTS | vision.INPUTS | audio.INPUTS | multimodal_inputs.INPUTS
TIGHT: Mapping[str, int] = text.TIGHT | multimodal.TIGHT
"""How tight a miniature is at least, where a class notices only when it runs: see `miniature.TIGHTER`."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = text.DEFAULTS | multimodal.DEFAULTS | vision.DEFAULTS
"""What the config of a type is made with where nothing at all gives one that its own class accepts."""
ATTENTION: Mapping[str, str] = audio.ATTENTION
"""How attention is computed where a class does not bear the plain way."""
LED = ("fun_asr_nano_encoder", "inkling2_text")
"""Types whose first layer is unlike the others of its kind: a miniature has that kind twice, not the last."""

__all__ = ["ATTENTION", "DEFAULTS", "FIELDS", "INPUTS", "LED", "TIGHT", "Each", "Open"]
