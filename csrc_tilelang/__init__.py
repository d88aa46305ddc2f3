"""TileLang kernel factories: integers in, a program out; no tensors, no torch, no state.

One kernel to a file; ``_device`` holds the device functions and the constants, the other modules
with an underscore the steps that several kernels share. Installed as ``mhc_ops.csrc_tilelang``.

Programmatic dependent launch. Every kernel waits for its predecessor (``T.pdl_sync``) before it
writes anything in global memory, and before it reads anything but ``fn``; what the others do before
the wait is a prefetch hint on weights, which reads nothing. They let their successor start
(``T.pdl_trigger``) only after the wait. Memory that torch's allocator hands from one kernel to the
next in stream order is therefore safe, and so is a weight that the predecessor has just written.

``fused_post_pre``, ``fused_post_pre_persistent`` and ``pre`` go further. Told so (``early``), they
read ``fn`` before the wait and let their successor start at once. So a successor may begin while
two kernels before it still run; its own wait is then for the nearer one, which has waited for the
other. The host tells them so only when an earlier call has read this very ``fn`` and nothing has
written it since: whatever wrote it has then finished. ``mhc_ops.native.early`` states the rule. Not
told so, they do as the others do.
"""
