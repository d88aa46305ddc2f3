"""Test the run under compute-sanitizer: which kernels it reaches, how it reads a tool's words."""

import json
import os
import stat
import subprocess

import pytest

import sanitize
import sanitizer_workload as workload
from helpers import needs_jit
from mhc_ops import routes
from mhc_ops.formula import evaluate
from other_routes import other_routes

ARCH = "sm_90a"


def kernels_of(case):
    """Return the keys that a case launches on an H100."""
    with other_routes(**workload.WAYS[case.way]):
        launches = routes.row(case.op, case.hidden, ARCH, case.tokens).launches
    return {launch.key(case.hidden, ARCH, case.norm) for launch in launches}


def test_every_kernel_is_reached_in_the_first_half():
    cases = workload.cases()
    reached = set().union(*(kernels_of(case) for case in cases[: len(cases) // 2]))
    assert reached == workload.keys(ARCH)
    assert {key.kernel for key in reached} == {
        "post", "projection", "finish", "post_projection", "head", "fused_post_pre", "expand",
        "expand_pre", "post_head", "fused_post_pre_persistent", "pre",
    }  # fmt: skip


def test_the_kernels_that_loop_have_one_cluster_for_all_tokens():
    for case in workload.cases():
        if case.way == "looping":
            with other_routes(**workload.WAYS[case.way]):
                row = routes.row(case.op, case.hidden, ARCH, case.tokens)
            values = {"tokens": case.tokens}
            assert evaluate(row.launches[0].scalars["group_tokens"], values) >= case.tokens


def test_the_path_of_other_gpus():
    with other_routes(**workload.WAYS["classical"]):
        assert not routes.in_clusters(256, ARCH)
    assert routes.in_clusters(256, ARCH)


@pytest.mark.parametrize("op", workload.OUTPUTS)
def test_cases_run(op):
    """Run cases on the CPU, where every way is the same."""
    for case in workload.cases()[:20]:
        if case.op == op:
            workload.run(case, "cpu")


def test_a_wrong_result(monkeypatch):
    case = workload.Case("post", False, 3, 256, "own")
    monkeypatch.setattr(workload, "as_outputs", lambda op, out: {"residual_out": out + 1})
    with pytest.raises(AssertionError, match=r"residual_out: .* beyond the bound"):
        workload.run(case, "cpu")


@pytest.mark.gpu
@needs_jit
def test_kernels_on_the_gpu(capsys):
    """Run the workload itself, as the tools do."""
    assert workload.main([]) == 0
    assert "NOT RUN" not in capsys.readouterr().out


CASES = "CASES: 60 of 60 right, 24 kernels\n"


@pytest.mark.parametrize(
    ("status", "output", "clean", "summary"),
    [
        (0, CASES + "========= ERROR SUMMARY: 0 errors\n", True, "0 errors"),
        (
            0,
            CASES + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings) \n",
            True,
            "0 hazards displayed (0 errors, 0 warnings)",
        ),
        (9, CASES + "========= ERROR SUMMARY: 3 errors\n", False, "3 errors"),
        (
            9,
            CASES + "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n",
            False,
            "1 hazard displayed (0 errors, 1 warning)",
        ),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors\n", False, "0 errors, exit status 1"),
        (0, "========= ERROR SUMMARY: 0 errors\n", False, "0 errors"),
        (0, CASES, False, "no summary"),
        (None, "", False, "cut off after 7 s, no summary"),
        (
            1,
            CASES + "NOT RUN: Key(...)\n========= ERROR SUMMARY: 0 errors\n",
            False,
            "0 errors, exit status 1, 1 kernels not run",
        ),
    ],
)
def test_verdict(status, output, clean, summary):
    verdict = sanitize.judge("memcheck", status, output, 7.0)
    assert (verdict.clean, verdict.summary) == (clean, summary)


def test_all_tools_and_their_records(tmp_path, monkeypatch, capsys):
    """Pretend a compute-sanitizer that finds an error with one tool."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'echo "CASES: 1 of 1 right, 1 kernels"\n'
        '[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 5\n'
        'case "$2" in\n'
        '  initcheck) echo "========= ERROR SUMMARY: 1 error"; exit 9;;\n'
        '  *) echo "========= ERROR SUMMARY: 0 errors";;\n'
        "esac\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    compiled = []
    original = subprocess.run

    def run(command, **options):
        if "--compile" in command:
            compiled.append(command)
            return None
        return original(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    output = tmp_path / "checks.jsonl"
    assert sanitize.main(["--commit", "c0ffee", "-o", str(output)]) == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(compiled) == 1
    assert [row["what"].split(":")[0] for row in rows] == list(sanitize.TOOLS)
    assert [row["clean"] for row in rows] == [True, True, False, True]
    assert {row["commit"] for row in rows} == {"c0ffee"}
    assert "initcheck  NOT CLEAN  1/1 cases, 1 error" in capsys.readouterr().out


def test_no_tool(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_tool", lambda given: None)
    assert sanitize.main([]) == 2
    assert "expected compute-sanitizer" in capsys.readouterr().err
