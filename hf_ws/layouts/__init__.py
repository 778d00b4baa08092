"""Layouts: which axes has each dimension of each tensor? Inferred, then proven."""

from hf_ws.layouts.certify import Certificate, certify
from hf_ws.layouts.explain import visible_sizes
from hf_ws.layouts.infer import Inferred, infer, tensors_of
from hf_ws.layouts.select import select
from hf_ws.layouts.stacks import before, generic, in_layer, stack_of

__all__ = [
    "Certificate",
    "Inferred",
    "before",
    "certify",
    "generic",
    "in_layer",
    "infer",
    "select",
    "stack_of",
    "tensors_of",
    "visible_sizes",
]
