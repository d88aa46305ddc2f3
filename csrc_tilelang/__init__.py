"""TileLang kernel factories: integers in, a program out; no tensors, no torch, no state.

One kernel to a file; ``_device`` holds the device functions and the constants, ``_steps`` and
``_collapse`` the steps that several kernels share. Installed as ``mhc_ops.csrc_tilelang``.

Programmatic dependent launch. Every kernel waits for its predecessor (``T.pdl_sync``) before it
reads or writes anything, and lets its successor start (``T.pdl_trigger``) only after that. So when
a kernel begins, all but its immediate predecessor have finished, and what it does before the wait
is a prefetch hint on weights, which reads nothing. Memory that torch's allocator hands from one
kernel to the next in stream order is therefore safe, and so is a weight that the predecessor has
just written.
"""
