"""The steps of the kernels, one formula in one place; a step imports steps, and never a kernel."""
