"""Hold the TileLang kernel factories: integers in, a program out; no tensors, no torch, no state.

README.md explains the words, the rules that all kernels follow, and the traps of the language. The
package is installed as ``mhc_ops.csrc_tilelang``.
"""
