"""Test whether the kernels can serve a device, why not, and what the CUDA ops say then."""

import sys
import types

import pytest
import torch

import mhc_ops
from helpers import OPS
from mhc_ops import support
from mhc_ops._arguments import recipe
from mhc_ops.native.serve import serve
from mhc_ops.testing import make_inputs


@pytest.fixture
def machine(monkeypatch):
    """Pretend to ``support`` a machine with one H100; set its attributes to change it."""
    machine = types.SimpleNamespace(available=True, capability=(9, 0), name="NVIDIA H100", count=1)
    caches = [f for f in vars(support).values() if hasattr(f, "cache_clear")]
    for function in caches:
        function.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: machine.name)
    yield machine
    for function in caches:
        function.cache_clear()


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", 0, torch.device("cuda")], ids=str)
def test_supported(machine, device):
    assert mhc_ops.is_supported(device) == (True, "TileLang kernels for sm_90a")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_architectures(machine, capability, arch):
    machine.capability = capability
    assert mhc_ops.is_supported("cuda") == (True, f"TileLang kernels for {arch}")


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_other_devices(machine, device):
    assert mhc_ops.is_supported(device) == (False, f"device {device} is not a CUDA device")


def test_rocm(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert mhc_ops.is_supported("cuda") == (False, "ROCm 6.4 is not supported")


def test_torch_without_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert mhc_ops.is_supported("cuda") == (False, "this torch is built without CUDA")


def test_no_cuda_device(machine):
    machine.available = False
    assert mhc_ops.is_supported("cuda") == (False, "no CUDA device is available")


def test_kernels_built_ahead_need_no_tilelang(machine, monkeypatch):
    """Support the device: a missing TileLang is an error of the call that needs a new kernel."""
    monkeypatch.setitem(sys.modules, "tilelang", None)
    assert mhc_ops.is_supported("cuda") == (True, "TileLang kernels for sm_90a")


def test_device_that_is_not_there(machine):
    assert mhc_ops.is_supported("cuda:3") == (False, "there is no CUDA device 3")


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_capability_below_8(machine, capability):
    machine.capability, machine.name = capability, "Old GPU"
    major, minor = capability
    reason = f"compute capability {major}.{minor} of Old GPU is below 8.0"
    assert mhc_ops.is_supported("cuda") == (False, reason)


def test_the_ops_give_the_reason(machine):
    machine.available = False
    with pytest.raises(RuntimeError) as error:
        support.require("post", torch.device("cuda", 0))
    assert str(error.value) == (
        "mhc::post: the CUDA kernels cannot serve cuda:0: no CUDA device is available"
    )


@pytest.mark.parametrize("op", OPS)
def test_every_op_asks_before_it_launches(op):
    """Call the CUDA implementation where there is no CUDA."""
    with pytest.raises(RuntimeError) as error:
        serve(op, recipe(op).bind((), make_inputs(op, 2, 256)))
    assert str(error.value) == (
        f"mhc::{op}: the CUDA kernels cannot serve cpu: device cpu is not a CUDA device"
    )


def test_require_passes_where_the_kernels_can_serve(machine):
    support.require("post", torch.device("cuda", 0))
