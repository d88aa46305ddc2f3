"""The CUDA source that TileLang generates, compiled with g++ and run on the CPU.

It checks arithmetic, indexing, bounds, what CTAs of a cluster send each other and (under
ThreadSanitizer) barriers; it knows nothing of the GPU's memory model beyond them, nor of speed.
``mhc_ops.compiler`` gets the source and the launch configuration out of TileLang, ``harness``
translates, builds and runs; ``include`` holds the C++ that stands in for CUDA.
"""

from .harness import EmulationError, Kernel, missing, translate

__all__ = ["EmulationError", "Kernel", "missing", "translate"]
