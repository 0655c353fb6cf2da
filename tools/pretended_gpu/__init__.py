"""A GPU that is not there: torch, Triton and inductor run all their host code on it, and kernels do nothing.

See README.md in this folder.
"""

from tools.pretended_gpu.build import BuildError, build
from tools.pretended_gpu.counters import counts, fill, last_refusal
from tools.pretended_gpu.running import environment

__all__ = ["BuildError", "build", "counts", "environment", "fill", "last_refusal"]
