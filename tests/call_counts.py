"""Count how often each mhc op is called."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class CallCounts(TorchDispatchMode):
    """Count the calls of mhc ops while active, in ``counts``: name to number."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mhc":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))
