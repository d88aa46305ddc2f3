"""Run CUDA calls: plans, the launcher, the short way and the long way, and early reading."""
