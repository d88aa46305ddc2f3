"""Name every device function once: ``device.cuh`` has the PTX, this file the calls from a kernel.

A kernel takes the PTX in with ``T.import_source(SOURCE)``. A place in memory is an element of a
buffer, as in ``send(slots_shared[0, rank], inboxes[0], owner, value)``, and stands for its address;
or it is an address that :func:`address` has made of an element.
"""

from pathlib import Path

import tilelang.language as T

# The two comment lines around the text let the tests' emulation put its own functions there.
SOURCE = (Path(__file__).parent / "device.cuh").read_text()


def _pointer(place, access):
    is_address = str(getattr(place, "dtype", "")) == "handle"
    return place if is_address else T.access_ptr(place, access)


def _read(place):
    return _pointer(place, "r")


def _written(place):
    return _pointer(place, "w")


def _call(name, *arguments):
    return T.call_extern("handle", f"mhc::{name}", *arguments)


def address(place):
    """Return the address of a place, for a name that stands for the place in several calls."""
    return T.access_ptr(place, "rw")


# Arithmetic


def mma_bf16(sums, fragment, b0, b1):
    """Add a product to 4 sums: mma.m16n8k16 of 4 words of A and 2 of B, fp32 inside."""
    return _call("mma_bf16", T.access_ptr(sums, "rw"), _read(fragment), b0, b1)


def split3(low, high, terms):
    """Split two fp32 into three packed bf16 pairs, the largest first, which add up to 24 bits."""
    return _call("split3", low, high, _written(terms))


def rcp(value):
    """Return 1 / value to 1 ulp, in one instruction."""
    return T.call_extern("float32", "mhc::rcp", value)


def multiply(a, b):
    """Return a * b, rounded, where the product becomes part of a sum.

    Of a * b + c * d, nvcc rounds one product and adds the other one unrounded. Which one nvcc
    rounds depends on what stands around the sum, and so would the bits of a token.
    """
    return T.call_extern("float32", "__fmul_rn", a, b)


# Global memory


def prefetch_l2(place):
    """Start to bring a line to L2.

    Nothing is read into the SM, so this may run before the previous kernel has finished.
    """
    return _call("prefetch_l2", _read(place))


def prefetch_l2_bulk(place, size):
    """Start to bring ``size`` bytes to L2, a multiple of 16, as :func:`prefetch_l2` does."""
    return _call("prefetch_l2_bulk", _read(place), size)


def store16(place, words):
    """Store 4 words in global memory."""
    return _call("store16", _written(place), _read(words))


# Loads to shared memory. cp.async: 16 bytes a lane, which the lane waits for by groups.


def load_async16(to, place):
    """Start to copy 16 bytes to shared memory, through L1."""
    return _call("load_async16", _written(to), _read(place))


def load_stream16(to, place):
    """Start to copy 16 bytes to shared memory, past L1: what is read once."""
    return _call("load_stream16", _written(to), _read(place))


def loads_commit():
    """Make a group of this thread's loads since the last group, be they none."""
    return _call("loads_commit")


def loads_wait(but=None):
    """Wait for all loads of this thread, or for all groups of loads but the last ``but``."""
    return _call("loads_wait" if but is None else f"loads_wait_but<{but}>")


# Bulk copies: a whole warp asks for one copy, and an inbox of the CTA is told of the bytes.


def load_bulk(to, place, size, inbox):
    """Start to copy ``size`` bytes to shared memory, a multiple of 16."""
    return _call("load_bulk", _written(to), _read(place), size, _written(inbox))


def load_bulk4(to, pitch, place, stride, size, inbox):
    """Start to copy 4 rows, ``stride`` bytes apart, to rows that are ``pitch`` bytes apart."""
    return _call("load_bulk4", _written(to), pitch, _read(place), stride, size, _written(inbox))


def bulk_fence():
    """Let the next bulk copies come after what this thread did, or saw done, in shared memory."""
    return _call("bulk_fence")


# An inbox is an mbarrier that counts bytes: a phase ends when all bytes that were announced have
# come. Phases have the parities 0, 1, 0 and so on.


def inbox_open(inbox, size):
    """Announce the ``size`` bytes of the first phase, in one thread, ahead of a cluster barrier."""
    return _call("inbox_open", _written(inbox), size)


def inbox_wait(inbox, parity=None):
    """Wait for a phase of this CTA's inbox, the first by default, and see what has come.

    The next phase must not end before all threads have seen the end of this one.
    """
    return _call("inbox_wait", _read(inbox), *(() if parity is None else (parity,)))


def inbox_again(inbox, size):
    """Announce ``size`` bytes of the next phase, in one thread that has waited for the last one.

    Bytes of the next phase that have come already count. The last phase may be left open.
    """
    return _call("inbox_again", _written(inbox), size)


# A gate is an mbarrier, too: a phase ends when threads of the CTA have passed it ``count`` times.


def gate_open(gate, count):
    """Set how often a gate is passed in a phase. One thread does so, ahead of a barrier."""
    return _call("gate_open", _written(gate), count)


def gate_pass(gate):
    """Let those who wait for the gate see what this thread did, or saw done."""
    return _call("gate_pass", _written(gate))


def gate_wait(gate, parity):
    """Wait for a phase of a gate."""
    return _call("gate_wait", _read(gate), parity)


# Messages to CTAs of the cluster. ``slot`` and ``inbox`` are places of this CTA, and the message
# goes to the same places of CTA ``rank``.


def send(slot, inbox, rank, value):
    """Send an fp32."""
    return _call("send", _written(slot), _written(inbox), rank, value)


def send2(slot, inbox, rank, first, second):
    """Send two fp32."""
    return _call("send2", _written(slot), _written(inbox), rank, first, second)


def send4(slot, inbox, rank, values):
    """Send four fp32, which begin at ``values``."""
    return _call("send4", _written(slot), _written(inbox), rank, _read(values))


def cluster_arrive_relaxed():
    """Arrive at the cluster's barrier without ordering memory.

    The barrier has to order the inboxes, and opening an inbox has a fence of its own.
    """
    return T.call_extern("handle", "tl::cluster_arrive_relaxed")
