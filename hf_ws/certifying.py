"""`certify`: the proof of a model class's layouts, from whatever names the class."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws import store
from hf_ws.errors import UnsupportedArchitectureError
from hf_ws.layouts import Certificate
from hf_ws.layouts import certify as certify_class


def certify(model: type[PreTrainedModel] | PreTrainedConfig | PreTrainedModel) -> Certificate:
    """Prove the layouts of a model class, or of the class that a config belongs to.

    Args:
        model: A class (its default config is taken), a config, or a live model.

    Raises:
        UnsupportedArchitectureError: the class could not be proven, with the axis that failed.
    """
    if isinstance(model, PreTrainedConfig):
        return certify_class(store.model_class(model), model)
    if isinstance(model, PreTrainedModel):
        return certify_class(type(model), model.config)
    config_class = getattr(model, "config_class", None)
    if config_class is None:
        raise UnsupportedArchitectureError(f"{model!r} is neither a config nor a Transformers model class")
    return certify_class(model, config_class())
