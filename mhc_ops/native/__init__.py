"""How a CUDA call runs: plans, the launcher, the short and the long way, and early reading."""
