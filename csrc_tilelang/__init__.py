"""TileLang kernel factories: integers in, a program out; no tensors, no torch, no state.

One kernel to a file; ``_device`` holds the device functions and the constants, ``_steps`` and
``_collapse`` the steps that several kernels share. Installed as ``mhc_ops.csrc_tilelang``.
"""
