"""The command line: what ``info`` shows, and that wrong use is refused with a message."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline

from mhc_ops import __main__, __version__, config, info

# the frame of a table: expecttest rewrites plain characters only
ASCII = str.maketrans({"─": "-", "│": "|"} | dict.fromkeys("┌┐└┘├┤┬┴┼", "+"))

H200 = {
    "versions": {
        "mhc_ops": "0.2.0",
        "python": "3.12.3",
        "torch": "2.11.0+cu130",
        "tilelang": "0.1.15",
        "transformers": None,
        "cuda": "13.0",
        "driver": "580.159.04",
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
    "cache_folder": "/cache",
    "switches": dict(config.DEFAULTS),
}


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for switch in config.DEFAULTS:
        monkeypatch.delenv(switch, raising=False)


def skeleton(value):
    """Keys and types: what users of ``--json`` may rely on."""
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
  "transformers": "text or null",
  "cuda": "text or null",
  "driver": "text or null"
 },
 "devices": [
  {
   "device": "text or null",
   "name": "text or null",
   "supported": "bool",
   "reason": "text or null"
  }
 ],
 "cache_folder": "text or null",
 "switches": {
  "MHC_OPS_FUSE_POST_PRE": "bool",
  "MHC_OPS_TILELANG_PRE": "bool",
  "MHC_OPS_TILELANG_POST": "bool",
  "MHC_OPS_DISABLE_JIT": "bool",
  "MHC_OPS_TRUST_CACHE": "bool"
 }
}""",
    )


def test_info_table(capsys, monkeypatch):
    monkeypatch.setattr(info, "collect", lambda: H200)
    assert __main__.main(["info"]) == 0
    assert_expected_inline(
        capsys.readouterr().out.translate(ASCII),
        """\
+-----------------------+--------------------------------------------------------------------------+
| mhc_ops               | 0.2.0                                                                    |
| python                | 3.12.3                                                                   |
| torch                 | 2.11.0+cu130                                                             |
| tilelang              | 0.1.15                                                                   |
| transformers          | -                                                                        |
| cuda                  | 13.0                                                                     |
| driver                | 580.159.04                                                               |
+-----------------------+--------------------------------------------------------------------------+
| cuda:0                | NVIDIA H200: supported: TileLang kernels for sm_90a                      |
| cuda:1                | Tesla V100: not supported: compute capability 7.0 of Tesla V100 is below |
|                       | 8.0                                                                      |
+-----------------------+--------------------------------------------------------------------------+
| kernel cache          | /cache                                                                   |
+-----------------------+--------------------------------------------------------------------------+
| MHC_OPS_FUSE_POST_PRE | 0                                                                        |
| MHC_OPS_TILELANG_PRE  | 1                                                                        |
| MHC_OPS_TILELANG_POST | 1                                                                        |
| MHC_OPS_DISABLE_JIT   | 0                                                                        |
| MHC_OPS_TRUST_CACHE   | 0                                                                        |
+-----------------------+--------------------------------------------------------------------------+
""",
    )


def test_info_shows_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TILELANG_CACHE_DIR", "/somewhere/else")
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "on")
    assert __main__.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cache_folder"] == "/somewhere/else"
    assert facts["switches"]["MHC_OPS_FUSE_POST_PRE"] is True


def test_info_refuses_a_wrong_switch(capsys, monkeypatch):
    monkeypatch.setenv("MHC_OPS_TILELANG_PRE", "maybe")
    assert __main__.main(["info"]) == 2
    assert capsys.readouterr().err == "MHC_OPS_TILELANG_PRE: expected 0 or 1, got 'maybe'\n"


def test_default_cache_folder_is_tilelangs(monkeypatch):
    monkeypatch.delenv("TILELANG_CACHE_DIR", raising=False)
    env = pytest.importorskip("tilelang.env")
    assert info.collect()["cache_folder"] == vars(type(env.env))["TILELANG_CACHE_DIR"].default


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
        (["--device", "cpu"], "device cpu is not a CUDA device"),
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
    """``info`` must answer at once, also where TileLang cannot be imported."""
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


@pytest.mark.parametrize("command", ["info", "selftest", "demo"])
def test_without_rich(command, monkeypatch, capsys):
    """It draws tables, and nothing else: a command that draws one says what is missing."""
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
    assert __main__.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__


def test_no_bar_without_rich(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = []
    prewarm = sys.modules["mhc_ops.prewarm"]  # whose function hides it
    with prewarm.progress_bar(True) as bar:
        prewarm.side_by_side(bar, "working", done.append, [1, 2, 3])
        bar.advance(bar.add_task("more", total=1))
    assert sorted(done) == [1, 2, 3]
