"""Early reading: whether a kernel may read ``fn`` before the kernel in front of it has finished.

Kernels that take ``early`` read ``fn`` before they wait for their predecessor on the stream, and
let their successor start at once; told not to, they do both only after the wait. A kernel may read
``fn`` early when an earlier call has read this very tensor and nothing has written it since: then
whatever wrote it had finished before that call read it. So a read counts once its launch has
succeeded, and

* only for the same tensor, at the same version and at the same place in memory;
* not for a tensor without a version counter, one that was made in inference mode;
* a read in a capture only for calls of the same capture: nothing has run yet.

The table of what was read is in the native library where that is loaded, and otherwise here. Both
follow these rules and pass the same tests.
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
    """What a call reads.

    Attributes:
        tensor: a weak reference, which keeps the tensor's address from being given away.
        address: of the tensor itself.
        version: of its content, before the launch.
        data: where its memory starts.
        capture: number of the capture that the call is in; 0 for none.
    """

    tensor: Any  # torch._C._WeakTensorRef, of which torch's stubs do not know
    address: int
    version: int
    data: int
    capture: int


class Table:
    """What the calls of this process have read."""

    def __init__(self) -> None:
        self._reads: dict[int, Read] = {}
        self._lock = threading.Lock()
        self._next_sweep = _FIRST_SWEEP

    def look(self, fn: Tensor, capture: Callable[[], int]) -> tuple[bool, Read | None]:
        """Whether a call may read a projection early.

        Args:
            fn: the projection.
            capture: tells the number of the capture that the call is in, 0 for none; asked only
                where it matters.

        Returns:
            (whether it may, what to give to :meth:`add` after the launch; None for nothing).
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
