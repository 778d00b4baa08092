"""Continued pretraining: text to blocks, the trainer the recipes share, and the folder that a run leaves."""

from hf_ws.training.caching import cache_teacher
from hf_ws.training.config import TrainConfig, config_from_flags, load_config_file
from hf_ws.training.trainer import History, train

__all__ = ["History", "TrainConfig", "cache_teacher", "config_from_flags", "load_config_file", "train"]
