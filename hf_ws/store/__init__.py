"""Read with suspicion, write all or nothing.

A checkpoint is somebody else's file. It is opened read-only, checked against its config before any work
starts, and no code from it ever runs. What we write appears under its final name only when it is whole.

    with open_source("gpt2") as source, new_folder("student") as folder:
        source.tensor("transformer.wte.weight")     # straight from the mapped file
"""

from hf_ws.store.config import load_config, model_class
from hf_ws.store.output import check_output, copy_side_files, new_folder
from hf_ws.store.source import Source, TensorInfo, open_source

__all__ = [
    "Source",
    "TensorInfo",
    "check_output",
    "copy_side_files",
    "load_config",
    "model_class",
    "new_folder",
    "open_source",
]
