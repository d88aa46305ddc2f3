"""Run a check in a process in which nothing has registered the ops, as in one without Python.

``test_standalone.py`` starts the process, which imports modules of the package, but not the
package, whose import would define the ops. The kernels are those of ``fake_driver.py``. The process
prints the name of the check that has passed.
"""

import ctypes
import sys
import threading
import types
from pathlib import Path

import torch

FOLDER, LIBRARY, DRIVER, PACKAGE, DATA = map(Path, sys.argv[2:7])

package = types.ModuleType("mhc_ops")
package.__path__ = [str(PACKAGE)]
sys.modules["mhc_ops"] = package

import fake_driver  # noqa: E402
from mhc_ops import routes  # noqa: E402
from mhc_ops.native.plan import plan  # noqa: E402
from mhc_ops.testing import OUTPUTS, as_outputs  # noqa: E402

HIDDEN = 256
OPS = tuple(OUTPUTS)

library = ctypes.CDLL(str(LIBRARY))
library.mhc_serve.restype = ctypes.c_char_p
library.mhc_serve.argtypes = (ctypes.c_char_p,)
library.mhc_calls.restype = ctypes.c_int64


def serve(folder=FOLDER):
    """Serve the ops from a folder; return what is wrong with it, or None."""
    wrong = library.mhc_serve(str(folder).encode() if folder else None)
    return wrong.decode().replace(str(FOLDER), "FOLDER") if wrong else None


def refusal(op, **inputs):
    """Return what a call is refused with, or None."""
    try:
        getattr(torch.ops.mhc, op)(**inputs)
    except RuntimeError as error:
        return str(error).partition("\nException raised")[0].replace(str(FOLDER), "FOLDER")
    return None


def ready(arch="sm_90a", sms=132):
    """Serve the ops on CPU tensors; return the driver, which keeps what it is asked to launch."""
    assert not hasattr(torch.ops.mhc, "post")
    driver = fake_driver.Listener(DRIVER)
    driver.keys = {fake_driver.compiled(key).symbol: key for key in routes.keys(HIDDEN, arch, 8192)}
    capability = arch[3:].rstrip("a")
    driver.library.fake_device(int(capability[:-1]), int(capability[-1]), sms)
    library.mhc_serve_cpu()
    wrong = serve()
    assert wrong is None, wrong
    return driver


def cases():
    return torch.load(DATA / "cases.pt", weights_only=True)


def bits():
    """Compare every op with the reference; kernels are loaded once, the short way serves."""
    driver = ready()
    for op, inputs, want in cases():
        loads, calls = driver.library.fake_loads(), library.mhc_calls()
        for _ in range(2):
            got = as_outputs(op, getattr(torch.ops.mhc, op)(**inputs))
            for name, value in want.items():
                assert torch.equal(got[name], value), (op, name)
        assert library.mhc_calls() - calls == 2
        more = driver.library.fake_loads() - loads
        loads += more
        getattr(torch.ops.mhc, op)(**inputs)
        assert driver.library.fake_loads() == loads
    assert serve() is None, "the same folder again"


def launches():
    """Compare the kernels, their numbers and their grids with those of a plan in Python."""
    arch, sms = sys.argv[7], int(sys.argv[8])
    driver = ready(arch, sms)
    driver.run = lambda launch: None
    for op, inputs, _ in cases():
        driver.launches.clear()
        getattr(torch.ops.mhc, op)(**inputs)
        tokens = next(iter(inputs.values())).shape[0]
        norm = inputs.get("norm_weight") is not None
        served = plan(op, HIDDEN, arch, sms, norm).range(tokens)
        assert [launch.key for launch in driver.launches] == [step.key for step in served.steps]
        for launch, step in zip(driver.launches, served.steps, strict=True):
            scalars = {
                name: fake_driver.formula.evaluate(f, {"tokens": tokens})
                for name, f in step.scalars.items()
            }
            given = {name: launch.arguments[name] for name in scalars if name in launch.arguments}
            assert given == {name: scalars[name] for name in given}
            grid = fake_driver.compiled(step.key).grid
            assert launch.grid == tuple(fake_driver.formula.evaluate(x, scalars) for x in grid)


def refusals():
    """Refuse by name what no plan serves, and serve what differs in strides alone."""
    driver = ready()
    every = {op: inputs for op, inputs, _ in cases() if "norm_weight" in inputs or op == "post"}
    inputs = every["fused_post_pre"]
    x, fn = inputs["x"], inputs["fn"]
    tokens = len(x)

    def said(**changes):
        return refusal("fused_post_pre", **(inputs | changes))

    expected = "mhc::fused_post_pre: expected "
    assert said(x=x.float()) == (
        f"{expected}x as BFloat16 [{tokens}, 256] on cpu, got Float [{tokens}, 256] on cpu"
    )
    assert said(fn=fn[:4]) == (
        f"{expected}fn as Float [24, 1024] on cpu, got Float [4, 1024] on cpu"
    )
    for beyond in (1e-60, 1e39):
        assert "rms_eps as a number that fp32 holds, at least 0" in said(rms_eps=beyond)
    assert (
        said(rms_eps=-1.0) == f"{expected}rms_eps as a number that fp32 holds, at least 0, got -1"
    )
    assert said(sinkhorn_repeat=0) == (
        f"{expected}sinkhorn_repeat as an integer from 1 to 10000, got 0"
    )
    assert said(norm_weight=None) == (
        f"{expected}norm_eps as None, as there is no norm_weight, got 1e-06"
    )
    assert said(residual=inputs["residual"][0, 0]).startswith(
        f"{expected}residual with at least 2 dimensions, got BFloat16 [256] on cpu"
    )
    wide = torch.zeros(2, 4, 512).bfloat16()
    assert refusal(
        "post", x=wide[:, 0], residual=wide, post_layer_mix=torch.zeros(2, 4, 1),
        comb_res_mix=torch.zeros(2, 4, 4),
    ) == (
        "mhc: there is no FOLDER/plans-sm_90a-512.txt; build the folder with python -m mhc_ops "
        "build"
    )  # fmt: skip
    weights = fn.clone().requires_grad_()
    assert "mhc::fused_post_pre: forward only" in said(fn=weights)
    with torch.no_grad():
        assert said(fn=weights) is None
    want = torch.ops.mhc.fused_post_pre(**inputs)
    awkward = inputs | {
        "x": torch.stack([x, x], -1)[..., 0],
        "residual": torch.cat([inputs["residual"].flatten()[:1], inputs["residual"].flatten()])[
            1:
        ].view(inputs["residual"].shape),
        "norm_weight": inputs["norm_weight"].float(),
    }
    for a, b in zip(torch.ops.mhc.fused_post_pre(**awkward), want, strict=True):
        assert torch.equal(a, b)
    driver.run = lambda launch: 701
    assert "cannot be launched" in said()
    driver.run = fake_driver.work
    none = {k: v[:0] if k in ("x", "residual", "post_layer_mix", "comb_res_mix") else v
            for k, v in inputs.items()}  # fmt: skip
    assert torch.ops.mhc.fused_post_pre(**none)[0].shape == (0, 4, 256)


def capture():
    """Refuse to load kernels during a capture, and use loaded ones in a capture."""
    driver = ready()
    op, inputs, _ = cases()[0]
    driver.library.fake_capture(7)
    assert refusal(op, **inputs) == (
        f"mhc::{op}: its kernels for hidden size 256 are not loaded on cpu and cannot be during "
        "the capture of a CUDA graph; call it once before the capture"
    )
    driver.library.fake_capture(0)
    assert refusal(op, **inputs) is None
    driver.library.fake_capture(7)
    assert refusal(op, **inputs) is None


def early():
    """Keep the rules of early reading: the second read of the same fn may be early."""
    driver = ready()
    inputs = next(i for op, i, _ in cases() if op == "fused_post_pre")
    for _ in range(3):
        torch.ops.mhc.fused_post_pre(**inputs)
    inputs["fn"].mul_(1)
    torch.ops.mhc.fused_post_pre(**inputs)
    assert [launch.arguments["early"] for launch in driver.launches] == [0, 1, 1, 0]


def threads():
    """Load each kernel once when many threads call for the first time."""
    driver = ready()
    wrong = []
    gate = threading.Barrier(8)
    every = [case for case in cases() if case[0] == "fused_post_pre"]

    def call():
        gate.wait()
        try:
            for op, inputs, want in every * 5:
                got = as_outputs(op, getattr(torch.ops.mhc, op)(**inputs))
                assert all(torch.equal(got[name], value) for name, value in want.items())
        except BaseException as error:
            wrong.append(error)

    running = [threading.Thread(target=call) for _ in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong
    plans = {"norm_weight" in inputs for _, inputs, _ in every}
    kernels = len(plans) * len(
        {
            s.key.kernel
            for r in plan("fused_post_pre", HIDDEN, "sm_90a", 132, True).ranges
            for s in r.steps
        }
    )
    assert driver.library.fake_loads() == kernels


def aoti():
    """Call the ops from a package of AOTInductor, through the dispatcher."""
    driver = ready()
    tensors = torch.load(DATA / "expected.pt", weights_only=True)
    loaded = torch._inductor.aoti_load_package(str(DATA / "stack.pt2"))
    for i in range(0, len(tensors), 3):
        hidden, streams = loaded.loader.run([tensors[i]])
        assert torch.equal(hidden, tensors[i + 1])
        assert torch.equal(streams, tensors[i + 2])
    few = [launch for launch in driver.launches if launch.key.kernel == "fused_post_pre"]
    assert len(few) == 6
    # A package keeps its weights as the same tensors: all but the first read of each is early.
    assert [launch.arguments["early"] for launch in few] == [0, 0, 0, 1, 1, 1]


def gpu():
    """Give the bits of Python with every op on a GPU, also from a CUDA graph."""
    assert serve() is None
    for op, inputs, want in cases():
        here = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        function, calls = getattr(torch.ops.mhc, op), library.mhc_calls()
        outputs = [as_outputs(op, function(**here))]
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            outputs.append(as_outputs(op, function(**here)))
        graph.replay()
        torch.cuda.synchronize()
        assert library.mhc_calls() - calls == 2
        for got in outputs:
            for name, value in want.items():
                assert torch.equal(got[name].cpu(), value), (op, name)


def damaged():
    """Print what is wrong with a folder."""
    print(serve())


def own_folder():
    """Serve the folder that the library lies in when none is named, and refuse another one then."""
    assert serve(None) is None
    assert hasattr(torch.ops.mhc, "post")
    other = serve("/other")
    assert other.endswith("already"), other


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(sys.argv[1], "passed")
