"""Decide on early reading: may a kernel read ``fn`` before the previous kernel has finished?

With ``early`` set, a kernel reads ``fn`` before it waits for the previous kernel of the stream, and
lets the next kernel start at once. Without ``early`` the kernel does both only after the wait. A
kernel may read ``fn`` early when an earlier call has read the same tensor and nothing has written
the tensor since, because every write had finished before that earlier call read. So a read is
remembered when its launch has succeeded, and counts under these rules:

* The tensor has to be the same, at the same version and at the same address.
* A tensor without a version counter, which is one made in inference mode, is never read early.
* A read in a capture counts only for calls of the same capture, because nothing of it has run yet.

Where the native library is loaded, its table of reads is used, otherwise the table of this module.
Both follow these rules and pass the same tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FIRST_SWEEP = 256


def _weak_reference(tensor: Tensor) -> Any:
    return torch._C._WeakTensorRef(tensor)  # type: ignore[attr-defined]


class Read(NamedTuple):
    """Describe what a call reads.

    Attributes:
        tensor: a weak reference, which keeps the tensor's address from being used again.
        address: address of the tensor object.
        version: version of the tensor's content, before the launch.
        data: address of the tensor's memory.
        capture: number of the capture that the call is in; 0 for none.
    """

    tensor: Any  # torch's stubs do not know the type, torch._C._WeakTensorRef
    address: int
    version: int
    data: int
    capture: int


class Table:
    """Remember what the calls of this process have read."""

    def __init__(self) -> None:
        self._reads: dict[int, Read] = {}
        self._lock = threading.Lock()
        self._next_sweep = _FIRST_SWEEP

    def look(self, fn: Tensor, capture: Callable[[], int]) -> tuple[bool, Read | None]:
        """Decide whether a call may read a projection early.

        Args:
            fn: the projection.
            capture: function that tells the number of the capture that the call is in, 0 for none;
                it is called only where the answer matters.

        Returns:
            (whether the call may, what to give to :meth:`add` after the launch or None).
        """
        if fn.is_inference():
            return False, None
        version, data = fn._version, fn.data_ptr()
        with self._lock:
            before = self._reads.get(fn._cdata)
        same = before is not None and (before.version, before.data) == (version, data)
        if same and before is not None and before.capture == 0:
            return True, None
        now = capture()
        if same and before is not None and before.capture == now:
            return True, None
        return False, Read(_weak_reference(fn), fn._cdata, version, data, now)

    def add(self, read: Read) -> None:
        """Remember a read whose launch has succeeded."""
        with self._lock:
            if len(self._reads) >= self._next_sweep:
                self._reads = {k: r for k, r in self._reads.items() if not r.tensor.expired()}
                self._next_sweep = max(_FIRST_SWEEP, 2 * len(self._reads))
            self._reads[read.address] = read

    def __len__(self) -> int:
        return len(self._reads)
