"""Calibration: what a model's channels, heads and neurons do on real text, collected in one pass.

    evidence = calibrate(model, ["some text", "more text"], tokenizer=tokenizer, wants=("mean_abs", "moments"))
    evidence["ffn", 3]                                         # mean |activation| of each neuron of layer 3
    evidence.moments["model.layers.3.mlp.down_proj.weight"]    # mean and second moments of what it reads

The hooks are placed by layout, not by name: a linear module that reads `ffn` sees each neuron's activation, one that
reads `(heads head_dim)` each head's context; every block's output is the residual stream.
"""

from hf_ws.evidence.calibrate import calibrate
from hf_ws.evidence.data import BATCH, BLOCK, calibration_inputs
from hf_ws.evidence.loss import device_of, loss_without, placed
from hf_ws.evidence.observation import Observation, observe, tokenizer_of
from hf_ws.evidence.record import STATISTICS, Evidence, Moments
from hf_ws.evidence.sites import by_axis, place

__all__ = [
    "BATCH",
    "BLOCK",
    "STATISTICS",
    "Evidence",
    "Moments",
    "Observation",
    "by_axis",
    "calibrate",
    "calibration_inputs",
    "device_of",
    "loss_without",
    "observe",
    "place",
    "placed",
    "tokenizer_of",
]
