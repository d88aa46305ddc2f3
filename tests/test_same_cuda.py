"""Test the gate of restructurings: what counts as the same CUDA, and what does not."""

import re
import shutil

import pytest

import machine_code
import same_cuda
from mhc_ops import compiler
from same_cuda import compare, difference

KERNEL = """
#include <tl_templates/cuda/gemm.h>
__device__ __forceinline__ float twice(float v) { return v * 2.0f; }  // a helper
extern "C" __global__ void __launch_bounds__(128, 1) k(const float* a, const float* b, int n);
extern "C" __global__ void __launch_bounds__(128, 1) k(const float* a, const float* b, int n) {
  float local[4];
  /* the sum */
  for (int i = 0; i < n; ++i) {
    local[i] = twice(a[i]) + __expf(b[i]);
  }
  asm volatile("mov.u32 %0, %1;" : "=r"(local[0]) : "r"(n));
}
"""

SAME = {
    "itself": lambda text: text,
    "a comment": lambda text: text.replace("the sum", "another word"),
    "line breaks": lambda text: text.replace("{\n", "\n{\n").replace("; ", ";\n"),
    "a variable": lambda text: text.replace("local", "sums"),
    "a loop variable": lambda text: text.replace("int i =", "int j =")
    .replace("i < n; ++i", "j < n; ++j")
    .replace("[i]", "[j]"),
    "a device function": lambda text: text.replace("twice", "doubled"),
    "a device function that nobody calls": lambda text: (
        "template <int n>\n__device__ int more(int v) { if (n) { return twice(v); } return n; }"
    ) + text,
    "the kernel": lambda text: text.replace(" k(", " kernel("),
    # TileLang sorts the signature by name.
    "a parameter that moves": lambda text: text.replace(
        "const float* a, const float* b, int n", "const float* b, int n, const float* z"
    ).replace("a[i]", "z[i]"),
}  # fmt: skip
OTHER = {
    "a number of a device function": lambda text: text.replace("2.0f", "3.0f"),
    "a number of a device function's device function": lambda text: (
        "__device__ float two() { return 2; }" + text.replace("2.0f", "two()")
    ),
    "an intrinsic": lambda text: text.replace("__expf", "__logf"),
    "an operator": lambda text: text.replace(") + __", ") - __"),
    "a bound": lambda text: text.replace("i < n", "i <= n"),
    "a type": lambda text: text.replace("float local", "double local"),
    "a parameter's type": lambda text: text.replace("const float* a", "const double* a"),
    "a parameter more": lambda text: text.replace("int n)", "int n, int m)"),
    "launch bounds": lambda text: text.replace("(128, 1)", "(256, 1)"),
    "assembly": lambda text: text.replace("mov.u32", "mov.b32"),
    "another variable": lambda text: text.replace("twice(a[i])", "twice(b[i])"),
    "a line less": lambda text: text.replace("local[i] = twice(a[i]) + __expf(b[i]);", ""),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME)
def test_the_same(change):
    assert difference(KERNEL, SAME[change](KERNEL)) is None


@pytest.mark.parametrize("change", OTHER)
def test_another(change):
    changed = OTHER[change](KERNEL)
    assert changed != KERNEL
    assert difference(KERNEL, changed)


def test_parameters_exchanged_are_another():
    """Find a difference, because the launcher binds parameters by name."""
    assert difference(
        KERNEL, KERNEL.replace("a[i]", "?").replace("b[i]", "a[i]").replace("?", "b[i]")
    )


def test_a_long_difference_is_cut():
    lines = difference(KERNEL, "int x;\n" * 40)
    assert len(lines) == 13
    assert lines[-1].startswith("… and ")


def test_kernels_of_one_revision_alone():
    said = compare({"a": KERNEL, "b": KERNEL}, {"a": KERNEL, "c": KERNEL})
    assert said == {"b": ["b: only at the base"], "c": ["c: only now"]}


@pytest.mark.slow
@pytest.mark.skipif(not (same_cuda.ROOT / ".git").exists(), reason="needs a git repository")
def test_the_head_against_itself(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(same_cuda, "KEPT", tmp_path)
    assert same_cuda.main(["HEAD", "--arch", "sm_80", "--hidden", "256"]) == 0
    assert capsys.readouterr().out == "11 of 11 kernels have the same CUDA\n"


# This kernel stores what it computes, so that nvcc leaves the loop in.
STORING = (
    KERNEL.replace("#include <tl_templates/cuda/gemm.h>\n", "")
    .replace("const float* b", "float* b")
    .replace(KERNEL[KERNEL.index("  asm") : -3], "  b[0] = local[n];")
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
CODE = {
    # The name of the kernel and the lines of the source are in the cubin.
    "names and lines": (lambda text: text.replace(" k(", " kernel(").replace("{", "{\n"), True),
    "an equal loop": (lambda text: text.replace("int i = 0; i < n", "int i = 0; n > i"), True),
    "a constant": (lambda text: text.replace("2.0f", "3.0f"), False),
    "launch bounds": (lambda text: text.replace("(128, 1)", "(256, 1)"), False),
}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("change", CODE)
def test_machine_code(change):
    apply, same = CODE[change]
    said = machine_code.compare("sm_90a", STORING, apply(STORING))
    assert (said is None) == same
    if not same:
        assert re.fullmatch(
            r"\d+ instructions, \d+ registers, 16 bytes of stack; now \d+ instructions, .*", said
        )


@needs_nvcc
@pytest.mark.slow
def test_machine_code_of_a_kernel_that_keeps_an_array():
    cubin = compiler.machine_code(STORING.replace("local[4]", "local[400]"), "sm_90a")
    assert machine_code.describe(cubin).endswith(" 1600 bytes of stack")


def test_the_same_machine_code_counts_as_the_same(monkeypatch, capsys):
    sources = {"post-sm_80-256": KERNEL, "pre-sm_80-256": KERNEL, "head-sm_80-256": KERNEL}
    changed = sources | {
        name: KERNEL.replace("2.0f", "3.0f") for name in ("post-sm_80-256", "head-sm_80-256")
    }
    monkeypatch.setattr(same_cuda, "sources_at", lambda *_: sources)
    monkeypatch.setattr(same_cuda, "_lower", lambda *_: changed)
    code = {"post-sm_80-256": None, "head-sm_80-256": "7 instructions; now 8 instructions"}
    monkeypatch.setattr(
        same_cuda, "compare_code", lambda names, base, new: {name: code[name] for name in names}
    )
    assert same_cuda.main(["base", "--machine-code"]) == 1
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first == "post-sm_80-256: same machine code"
    assert second == "head-sm_80-256: differs: 7 instructions; now 8 instructions"
    assert last == "1 of 3 kernels have the same CUDA"
    code["head-sm_80-256"] = None
    assert same_cuda.main(["base", "--machine-code"]) == 0
    assert same_cuda.main(["base"]) == 1


def test_an_unknown_revision():
    with pytest.raises(SystemExit, match="expected a revision that git knows, got nowhere"):
        same_cuda.main(["nowhere"])
