"""What evidence was collected from: enough to tell whether a saved file is of the same model, data and code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from hf_ws._version import __version__

FORMAT = 2
"""Of the sums and of the saved form: counts as code."""


PLACES = ("_name_or_path", "architectures", "transformers_version")
"""Fields of a config that say where it was read and who wrote it: another folder holds the same model."""


def fingerprint(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], wants: tuple[str, ...]
) -> dict[str, str]:
    """Model (class and config), a sample of its weights, data (every value), code (versions), and what is wanted."""
    config = json.dumps(_without_places(model.config.to_dict()), sort_keys=True, default=str)
    of_data = hashlib.sha256()
    for inputs in batches:
        for name, value in sorted(inputs.items()):
            of_data.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            whole = value.detach().cpu().contiguous()
            of_data.update((whole.double() if whole.is_floating_point() else whole).numpy().tobytes())
    return {
        "model": hashlib.sha256(f"{type(model).__name__} {config}".encode()).hexdigest(),
        "weights": weights_fingerprint(model),
        "data": of_data.hexdigest(),
        "code": f"hf_ws {__version__}, transformers {transformers_version}, format {FORMAT}",
        "wants": ",".join(wants),
    }


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A sha256 over the parameters: name, shape, type, and the first numbers of each; offloaded ones too."""
    found = hashlib.sha256()
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for own, tensor in module.named_parameters(prefix, recurse=False):
                sample = tensor.detach().flatten()[:64].double().cpu()
                found.update(
                    f"{own} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.numpy().tobytes()
                )
    return found.hexdigest()


def _without_places(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _without_places(value) for key, value in config.items() if key not in PLACES}
