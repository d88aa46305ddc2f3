"""Test the command line: what ``info`` shows, and that wrong use is refused with a message."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline

from mhc_ops import __main__, __version__, config, info, routes, store

H200 = {
    "versions": {
        "mhc_ops": "0.2.0",
        "python": "3.12.3",
        "torch": "2.11.0+cu130",
        "tilelang": "0.1.15",
        "triton": "3.6.0",
        "transformers": None,
        "sglang": None,
        "vllm": None,
        "cuda": "13.0",
    },
    "devices": [
        {
            "device": "cuda:0",
            "name": "NVIDIA H200",
            "supported": True,
            "reason": "TileLang kernels for sm_90a",
        },
        {
            "device": "cuda:1",
            "name": "Tesla V100",
            "supported": False,
            "reason": "compute capability 7.0 of Tesla V100 is below 8.0",
        },
    ],
    "system": "Linux-6.8-x86_64-with-glibc2.39, Ubuntu 24.04 LTS",
    "driver": "580.159.04",
    "tools": {"nvcc": "release 13.0 (/usr/local/cuda/bin/nvcc)"},
    "variables": {"MHC_OPS_TRUST_CACHE": "0 (not set)"},
    "folders": {"cache": "/cache: 3 files, 0.1 MiB, trusted"},
    "kernels": {"sm_90a": "hidden 4096: 2 built ahead, 0 cached of 30"},
    "libraries": {"launcher": "cached: /cache/launcher.so"},
}


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for name in config.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def skeleton(value):
    """Reduce a value to keys and types, on which users of ``--json`` may rely."""
    if isinstance(value, dict):
        return {key: skeleton(item) for key, item in value.items()}
    if isinstance(value, list):
        return [skeleton(value[0])]
    return "bool" if isinstance(value, bool) else "text or null"


def test_info_json(capsys):
    assert __main__.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["mhc_ops"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert_expected_inline(
        json.dumps(skeleton(facts), indent=1),
        """\
{
 "versions": {
  "mhc_ops": "text or null",
  "python": "text or null",
  "torch": "text or null",
  "tilelang": "text or null",
  "triton": "text or null",
  "transformers": "text or null",
  "sglang": "text or null",
  "vllm": "text or null",
  "cuda": "text or null"
 },
 "devices": [
  {
   "device": "text or null",
   "name": "text or null",
   "supported": "bool",
   "reason": "text or null"
  }
 ],
 "system": "text or null",
 "driver": "text or null",
 "tools": {
  "nvcc": "text or null",
  "C compiler": "text or null",
  "C++ compiler": "text or null"
 },
 "variables": {
  "MHC_OPS_FUSE_POST_PRE": "text or null",
  "MHC_OPS_TILELANG_PRE": "text or null",
  "MHC_OPS_TILELANG_POST": "text or null",
  "MHC_OPS_DISABLE_JIT": "text or null",
  "MHC_OPS_TRUST_CACHE": "text or null",
  "MHC_OPS_KERNELS": "text or null",
  "MHC_OPS_AOT_ARCHS": "text or null",
  "MHC_OPS_AOT_HIDDEN": "text or null",
  "MHC_OPS_AOT_TORCH": "text or null",
  "TILELANG_CACHE_DIR": "text or null",
  "CC": "text or null",
  "CXX": "text or null",
  "CUDA_HOME": "text or null",
  "CUDA_PATH": "text or null",
  "TMPDIR": "text or null"
 },
 "folders": {
  "cache": "text or null",
  "kernels built ahead": "text or null"
 },
 "kernels": {},
 "libraries": {
  "launcher": "text or null",
  "short way of eager calls": "text or null"
 }
}""",
    )


def test_info_lines(capsys, monkeypatch):
    monkeypatch.setattr(info, "collect", lambda: H200)
    assert __main__.main(["info"]) == 0
    assert_expected_inline(
        capsys.readouterr().out,
        """\
mhc_ops              0.2.0
python               3.12.3
system               Linux-6.8-x86_64-with-glibc2.39, Ubuntu 24.04 LTS
torch                2.11.0+cu130
tilelang             0.1.15
triton               3.6.0
transformers         not installed
sglang               not installed
vllm                 not installed
CUDA of torch        13.0
NVIDIA driver        580.159.04
cuda:0               NVIDIA H200: supported: TileLang kernels for sm_90a
cuda:1               Tesla V100: not supported: compute capability 7.0 of Tesla V100 is below 8.0
nvcc                 release 13.0 (/usr/local/cuda/bin/nvcc)
MHC_OPS_TRUST_CACHE  0 (not set)
cache                /cache: 3 files, 0.1 MiB, trusted
kernels of sm_90a    hidden 4096: 2 built ahead, 0 cached of 30
launcher             cached: /cache/launcher.so
""",
    )


def shown(capsys):
    """Run ``info`` and return what it prints, label to text."""
    assert __main__.main(["info"]) == 0
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def fact(capsys, label):
    (text,) = (text for name, text in shown(capsys).items() if name.strip() == label)
    return text.strip()


def test_info_finds_everything_out(capsys):
    lines = shown(capsys)
    assert not [line for line in lines.items() if "cannot be found out" in line[1]]


def test_info_shows_the_environment(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "on")
    monkeypatch.setenv("MHC_OPS_KERNEL", "/kernels")
    monkeypatch.setenv("MHC_OPS_TILELANG_PRE", "maybe")
    assert fact(capsys, "cache").startswith(f"{tmp_path}/mhc_ops: not there")
    assert fact(capsys, "MHC_OPS_FUSE_POST_PRE") == "1"
    assert fact(capsys, "MHC_OPS_TRUST_CACHE") == "0 (not set)"
    assert fact(capsys, "MHC_OPS_KERNELS") == "not set"
    assert fact(capsys, "MHC_OPS_KERNEL") == (
        "'/kernels', which nothing reads; MHC_OPS_KERNELS was meant?"
    )
    assert fact(capsys, "MHC_OPS_TILELANG_PRE") == (
        "'maybe', which is refused where it is read: expected 0 or 1"
    )


def test_info_shows_a_variable_that_names_no_kernels(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path / "none"))
    assert fact(capsys, "MHC_OPS_KERNELS").startswith(
        f"'{tmp_path}/none', which is refused where it is read: MHC_OPS_KERNELS: expected a folder"
    )
    (tmp_path / "post-sm_90a-256.json").write_text("{}")
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path))
    assert fact(capsys, "MHC_OPS_KERNELS") == str(tmp_path)


def write_tool(path, says):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


def test_info_shows_the_compilers_that_are_used(capsys, monkeypatch, tmp_path):
    """Look for nvcc as TileLang does, which takes that of CUDA_HOME before that of the path."""
    for place, version in (("home", "13.1"), ("path", "13.0")):
        write_tool(tmp_path / place / "bin" / "nvcc", f"tools, release {version}")
    write_tool(tmp_path / "path" / "bin" / "my-g++", "my-g++ 12.2")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "my-g++ -m64")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert fact(capsys, "nvcc") == f"tools, release 13.0 ({tmp_path}/path/bin/nvcc)"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert fact(capsys, "nvcc") == f"tools, release 13.1 ({tmp_path}/home/bin/nvcc)"
    assert fact(capsys, "CUDA_HOME") == str(tmp_path / "home")
    assert fact(capsys, "CXX") == "my-g++ -m64"
    assert fact(capsys, "C++ compiler") == f"my-g++ 12.2 ({tmp_path}/path/bin/my-g++)"
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert fact(capsys, "nvcc") == "/nowhere/bin/nvcc: not found"


def test_info_says_who_else_can_write_the_cache(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "mhc_ops"
    folder.mkdir()
    (folder / "one").write_bytes(b"x" * 2**20)
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    assert fact(capsys, "cache") == f"{folder}: 1 files, 1.0 MiB, trusted"
    folder.chmod(0o777)
    exposed = f"{folder} can be written by others (mode 0777)"
    assert fact(capsys, "cache") == f"{folder}: 1 files, 1.0 MiB, refused: {exposed}"
    monkeypatch.setenv("MHC_OPS_TRUST_CACHE", "1")
    assert fact(capsys, "cache") == f"{folder}: 1 files, 1.0 MiB, used although {exposed}"


def test_info_counts_the_kernels_that_are_there(capsys, monkeypatch, tmp_path):
    wanted = routes.keys(256, "sm_80", sys.modules["mhc_ops.prewarm"].DEFAULT_MAX_TOKENS)
    for index, key in enumerate(wanted[:3]):
        stem = store.file_name(key)
        sources = store.kernels_built_with()["sources"] if index else "other"
        (tmp_path / f"{stem}.cubin").touch()
        (tmp_path / f"{stem}.json").write_text(json.dumps({"sources": sources}))
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fact(capsys, "kernels of sm_80") == (
        f"hidden 256: 2 built ahead, 0 cached of {len(wanted)}; some are of other sources"
    )


@pytest.mark.parametrize("name", ["_system", "_driver", "_nvcc", "_folder", "_library"])
def test_info_never_raises(capsys, monkeypatch, name):
    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(info, name, fail)
    texts = list(shown(capsys).values())
    assert any(text.strip() == "cannot be found out: RuntimeError: broken" for text in texts)


def test_info_of_a_broken_driver(capsys, monkeypatch):
    def fail(index=None):
        raise RuntimeError("CUDA driver error")

    monkeypatch.setattr(info.support, "is_supported", fail)
    assert fact(capsys, "cuda") == (
        "not supported: cannot be found out: RuntimeError: CUDA driver error"
    )


def test_default_cache_folder_is_tilelangs(monkeypatch):
    monkeypatch.delenv("TILELANG_CACHE_DIR", raising=False)
    env = pytest.importorskip("tilelang.env")
    default = vars(type(env.env))["TILELANG_CACHE_DIR"].default
    assert str(config.cache_folder()) == default


def test_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "$0.arguments"\necho "580.159.04, 1980, [N/A]"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    properties = SimpleNamespace(uuid="11d5a0a4-0000")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    fields = ("driver_version", "clocks.sm", "clocks.mem")
    want = {"driver_version": "580.159.04", "clocks.sm": "1980", "clocks.mem": None}
    assert info.nvidia_smi(0, *fields) == want
    assert (tmp_path / "nvidia-smi.arguments").read_text() == (
        "--id=GPU-11d5a0a4-0000 --query-gpu=driver_version,clocks.sm,clocks.mem "
        "--format=csv,noheader,nounits\n"
    )
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert info.nvidia_smi(0, *fields) == dict.fromkeys(fields)
    monkeypatch.setenv("PATH", "/nowhere")
    assert info.nvidia_smi(0, *fields) == dict.fromkeys(fields)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tune"], "argument COMMAND: invalid choice: 'tune' (choose from"),
        (["info", "--yaml"], "unrecognized arguments: --yaml"),
        (["prewarm", "--hidden", "x"], "argument --hidden: invalid int value: 'x'"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        __main__.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hidden", "100"], "expected hidden sizes that are multiples of 256, got 100"),
        (["--max-tokens", "0"], "expected max_tokens of at least 1, got 0"),
        (
            ["--device", "cpu"],
            "expected a GPU that the ops support: device cpu is not a CUDA device",
        ),
    ],
)
def test_prewarm_refuses(capsys, argv, message):
    assert __main__.main(["prewarm", *argv]) == 2
    assert capsys.readouterr().err == f"mhc_ops.prewarm: {message}\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"mhc_ops {__version__}\n"


def test_every_command_is_a_module():
    for module, _ in __main__.COMMANDS.values():
        assert importlib.util.find_spec(f"mhc_ops.{module}") is not None


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    shown = capsys.readouterr().out
    for command, (_, text) in __main__.COMMANDS.items():
        assert command in shown
        assert text in shown


def test_a_command_imports_only_its_own():
    """Let ``info`` answer at once, also where TileLang cannot be imported."""
    code = (
        "import sys; from mhc_ops.__main__ import main; status = main(['info'])\n"
        "loaded = {'tilelang', 'tvm', 'transformers', 'mhc_ops.bench', 'mhc_ops.demo'}\n"
        "assert not loaded & sys.modules.keys(), loaded & sys.modules.keys()\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "mhc_ops", "info", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["mhc_ops"] == __version__


@pytest.mark.parametrize("command", ["selftest", "demo"])
def test_without_rich(command, monkeypatch, capsys):
    """Say that rich is missing where a command draws a table, which is all that rich does."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "mhc_ops.demo", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert __main__.main([command]) == 2
    assert capsys.readouterr().err == (
        f"python -m mhc_ops {command}: expected rich, which draws the tables, got none; "
        "pip install 'rich>=13,<16'\n"
    )


def test_what_needs_no_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert __main__.main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_no_bar_without_rich(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = []
    prewarm = sys.modules["mhc_ops.prewarm"]  # The function of the same name hides the module.
    with prewarm.progress_bar(True) as bar:
        prewarm.side_by_side(bar, "working", done.append, [1, 2, 3])
        more = bar.add_task("more", total=2)
        bar.advance(more)
        bar.update(more, completed=2)
    assert sorted(done) == [1, 2, 3]
