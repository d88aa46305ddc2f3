"""Compile the CUDA source that TileLang generates with g++, and run it on the CPU.

The emulation checks arithmetic, indexing, bounds, what CTAs of a cluster send each other and (under
ThreadSanitizer) barriers; the emulation knows nothing else of the GPU's memory model, nor of speed.
``mhc_ops.compiler`` gets the source and the launch configuration out of TileLang, ``harness``
translates, builds and runs; ``include`` holds the C++ that stands in for CUDA.
"""

from .harness import EmulationError, Kernel, missing, translate

__all__ = ["EmulationError", "Kernel", "missing", "translate"]
