"""What evidence was collected from: enough to tell whether a saved file is of the same model, data and code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from hf_ws._version import __version__

FORMAT = 1
"""Of the sums and of the saved form: counts as code."""


def fingerprint(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], wants: tuple[str, ...]
) -> dict[str, str]:
    """Model (config, and a sample of every tensor), data (every value), code (versions), and what is wanted."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    of_model = hashlib.sha256(f"{type(model).__name__} {config}".encode())
    for name, tensor in model.state_dict().items():
        sample = tensor.detach().flatten()[:64].double().cpu()
        of_model.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.numpy().tobytes())
    of_data = hashlib.sha256()
    for inputs in batches:
        for name, value in sorted(inputs.items()):
            of_data.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            whole = value.detach().cpu().contiguous()
            of_data.update((whole.double() if whole.is_floating_point() else whole).numpy().tobytes())
    return {
        "model": of_model.hexdigest(),
        "data": of_data.hexdigest(),
        "code": f"hf_ws {__version__}, transformers {transformers_version}, format {FORMAT}",
        "wants": ",".join(wants),
    }
