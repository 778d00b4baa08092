"""Layouts: which axes has each dimension of each tensor? Inferred, then proven."""

from hf_ws.layouts.certify import Certificate, certify
from hf_ws.layouts.explain import visible_sizes
from hf_ws.layouts.infer import Inferred, generic, infer, tensors_of
from hf_ws.layouts.select import select

__all__ = [
    "Certificate",
    "Inferred",
    "certify",
    "generic",
    "infer",
    "select",
    "tensors_of",
    "visible_sizes",
]
