"""Layouts: which axes has each dimension of each parameter? Inferred, then proven."""

from hf_ws.layouts.certify import Certificate, certify
from hf_ws.layouts.infer import Inferred, generic, infer, visible_sizes
from hf_ws.layouts.select import select

__all__ = ["Certificate", "Inferred", "certify", "generic", "infer", "select", "visible_sizes"]
