"""Say whether the TileLang kernels can serve a device, and if not, why."""

from __future__ import annotations

import functools

import torch

LEAST_CAPABILITY = (8, 0)  # the kernels use cp.async and bf16 mma, which begin with it


def _normalise(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        return torch.device("cuda")
    if isinstance(device, int):
        return torch.device("cuda", device)
    return torch.device(device)


@functools.cache
def _cuda_support(index: int) -> tuple[bool, str]:
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return False, (
            f"compute capability {capability[0]}.{capability[1]} of "
            f"{torch.cuda.get_device_name(index)} is below "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        )
    return True, f"TileLang kernels for {arch(torch.device('cuda', index))}"


def is_supported(device: torch.device | str | int | None = None) -> tuple[bool, str]:
    """Say whether the TileLang kernels can run on a device.

    Args:
        device: a device, its name or its CUDA index; the current CUDA device when None.

    Returns:
        (True, what will serve it) or (False, the reason why the kernels cannot).

    Example:
        >>> import mhc_ops
        >>> mhc_ops.is_supported("cpu")
        (False, 'device cpu is not a CUDA device')
    """
    wanted = _normalise(device)
    if wanted.type != "cuda":
        return False, f"device {wanted} is not a CUDA device"
    if torch.version.hip is not None:
        return False, f"ROCm {torch.version.hip} is not supported"
    if torch.version.cuda is None:
        return False, "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return False, "no CUDA device is available"
    index = cuda_device(wanted).index
    if index >= torch.cuda.device_count():
        return False, f"there is no CUDA device {index}"
    return _cuda_support(index)


def cuda_device(device: torch.device | str | int | None = None) -> torch.device:
    """Return a CUDA device with its index.

    Args:
        device: a CUDA device, its name or its index; None for the current device.

    Returns:
        The device with its index; the current device where no index is given.
    """
    wanted = _normalise(device)
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    return torch.device("cuda", index)


def arch_name(major: int, minor: int) -> str:
    """Return TileLang's name of a compute capability, which ends in ``a`` from Hopper on."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def arch(device: torch.device) -> str:
    """Return TileLang's name of a CUDA device's architecture, such as ``sm_90a``.

    Args:
        device: a CUDA device with an index.
    """
    return arch_name(*torch.cuda.get_device_capability(device))


@functools.cache
def sm_count(device: torch.device) -> int:
    """Count the multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _refusal(device: torch.device) -> str | None:
    supported, reason = is_supported(device)
    return None if supported else reason


def require(op: str, device: torch.device) -> None:
    """Refuse a device that the kernels cannot serve.

    Args:
        op: name of the op, for the message.
        device: device of the op's tensors.

    Raises:
        RuntimeError: the kernels cannot serve the device; the message gives the reason that
            :func:`is_supported` gives.
    """
    reason = _refusal(device)
    if reason is not None:
        raise RuntimeError(f"mhc::{op}: the CUDA kernels cannot serve {device}: {reason}")
