"""Tell what this installation is and what it can run, as a bug report needs it.

``python -m mhc_ops info`` prints one line for each fact. Each fact is looked up by itself, so one
that cannot be found out says so in its own line. The command imports torch, and compiles and loads
nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import __version__, config, support, trust

# These are read, too, by this package or by the compilers that it calls.
OTHER_VARIABLES = ("TILELANG_CACHE_DIR", "CC", "CXX", "CUDA_HOME", "CUDA_PATH", "TMPDIR")
PACKAGES = ("tilelang", "triton", "transformers", "sglang", "vllm")
TOOL_SECONDS = 10  # a tool has this long to say its version
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_ABSENT = "not installed"


def installed_version(package: str) -> str | None:
    """Return the version of an installed package without importing it; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi(index: int, *fields: str) -> dict[str, str | None]:
    """Ask ``nvidia-smi`` about one GPU.

    Args:
        index: torch's index of a CUDA device. The device's UUID identifies it to ``nvidia-smi``,
            which counts devices that are hidden from torch too.
        fields: names that ``nvidia-smi --help-query-gpu`` lists.

    Returns:
        Field to text; None for a field that is not available, and for all fields where
        ``nvidia-smi`` is missing or fails.
    """
    answers: dict[str, str | None] = dict.fromkeys(fields)
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return answers
    uuid = torch.cuda.get_device_properties(index).uuid
    try:
        line = subprocess.run(
            [
                tool,
                f"--id=GPU-{uuid}",
                f"--query-gpu={','.join(fields)}",
                "--format=csv,noheader,nounits",
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return answers
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) == len(fields):
        answers.update(
            (field, value)
            for field, value in zip(fields, values, strict=True)
            if not value.startswith("[")  # such a value is [N/A] or [Not Supported]
        )
    return answers


# ------------------------------------------------------------------------------------- the facts


def _guarded(find_out: Callable[..., str], *arguments: Any) -> str:
    """Return the text of a look-up, or why it failed, so that one failure hides no other fact."""
    try:
        return find_out(*arguments)
    except Exception as error:
        return f"cannot be found out: {type(error).__name__}: {error}"


def _driver() -> str:
    if torch.cuda.is_available():
        found = nvidia_smi(torch.cuda.current_device(), "driver_version")["driver_version"]
        if found is not None:
            return found
    try:
        loaded = re.search(r"Module +([\d.]+)", DRIVER_FILE.read_text())
    except OSError:
        loaded = None
    return loaded[1] if loaded else "not found"


def _versions() -> dict[str, str | None]:
    return {
        "mhc_ops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed_version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,  # torch was built with this version
    }


def _system() -> str:
    try:
        release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        release = ""
    return ", ".join(filter(None, (platform.platform(), release)))


def _devices() -> list[dict[str, Any]]:
    try:
        return _cuda_devices()
    except Exception as error:
        said = f"cannot be found out: {type(error).__name__}: {error}"
        return [{"device": "cuda", "name": None, "supported": False, "reason": said}]


def _cuda_devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        supported, reason = support.is_supported("cuda")
        return [{"device": "cuda", "name": None, "supported": supported, "reason": reason}]
    devices = []
    for index in range(torch.cuda.device_count()):
        supported, reason = support.is_supported(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "supported": supported,
                "reason": reason,
            }
        )
    return devices


def _tool(command: Sequence[str], line: str) -> str:
    """Ask a tool for its version; return the first line that contains a text, and the path."""
    path = shutil.which(command[0])
    if path is None:
        return f"{shlex.join(command)}: not found"
    done = subprocess.run(
        [path, *command[1:], "--version"], capture_output=True, text=True, timeout=TOOL_SECONDS
    )
    said = [text.strip() for text in done.stdout.splitlines() if line in text]
    return f"{said[0] if said else 'says no version'} ({path})"


def _nvcc() -> str:
    """Look for nvcc where TileLang does, and in its order, without importing TileLang."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return _tool([f"{home}/bin/nvcc"], "release")
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = [str(file.locate()) for file in files if file.name == "nvcc"]
    places = (shutil.which("nvcc"), *packaged, "/usr/local/cuda/bin/nvcc")
    found = next((place for place in places if place and os.access(place, os.X_OK)), "nvcc")
    return _tool([found], "release")


def _c_compiler() -> str:
    return _tool(shlex.split(os.environ.get("CC", "cc")), "")


def _cpp_compiler() -> str:
    return _tool(shlex.split(os.environ.get("CXX", "g++")), "")


def _variable(name: str) -> str:
    text = os.environ.get(name)
    if name == "MHC_OPS_KERNELS" and text:
        try:
            config.kernels_folder()
        except ValueError as error:
            return f"{text!r}, which is refused where it is read: {error}"
    if name not in config.DEFAULTS:
        return text or "not set"
    try:
        value = str(int(config.switch(name)))
    except ValueError:
        return f"{text!r}, which is refused where it is read: expected 0 or 1"
    return value if text and text.strip() else f"{value} (not set)"


def _misspelt(name: str) -> str:
    return f"{os.environ[name]!r}, {config.meant(name)}"


def _size(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"


def _folder(folder: Path) -> str:
    what = _size(folder) if folder.is_dir() else "not there"
    exposure = trust.exposure(folder)
    if exposure is None:
        return f"{folder}: {what}, trusted"
    allowed = config.switch("MHC_OPS_TRUST_CACHE")
    return f"{folder}: {what}, {'used although' if allowed else 'refused:'} {exposure}"


def _stored(folder: Path) -> dict[str, str]:
    """Map the stem of each kernel in a folder to the hash of the sources it was built from."""
    found = {}
    for path in folder.glob("*.cubin"):
        try:
            found[path.stem] = str(json.loads(path.with_suffix(".json").read_bytes())["sources"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            found[path.stem] = "unknown"
    return found


def _kernels(arch: str) -> str:
    """Count how many of the kernels that prewarm would load for an architecture are there."""
    from . import routes, store
    from .prewarm import DEFAULT_MAX_TOKENS

    sources = store.kernels_built_with()["sources"]
    cache = config.own_cache_folder() / f"kernels-{store.digest(store.kernels_built_with())}"
    places = {"built ahead": _stored(config.kernels_folder()), "cached": _stored(cache)}
    of_arch = {
        place: {stem: made for stem, made in kernels.items() if stem.split("-")[1:2] == [arch]}
        for place, kernels in places.items()
    }
    sizes = {int(stem.split("-")[2]) for kernels in of_arch.values() for stem in kernels}
    said = []
    for hidden in sorted(sizes):
        wanted = {store.file_name(key) for key in routes.keys(hidden, arch, DEFAULT_MAX_TOKENS)}
        counts = [
            f"{sum(made == sources and stem in wanted for stem, made in kernels.items())} {place}"
            for place, kernels in of_arch.items()
        ]
        said.append(f"hidden {hidden}: {', '.join(counts)} of {len(wanted)}")
    if any(made != sources for kernels in of_arch.values() for made in kernels.values()):
        said.append("some are of other sources")
    return "; ".join(said) or "none built ahead, none cached"


def _library(name: str, built_with: Mapping[str, str]) -> str:
    from . import store

    cached = config.own_cache_folder() / f"{name}-{store.digest(built_with)}"
    for place, folder in (("built ahead", config.kernels_folder()), ("cached", cached)):
        found = store.find(folder, name, store.LIBRARY, built_with, read=Path.read_bytes)
        if found is not None:
            return f"{place}: {found.path}"
    return "not there: built when the first kernel is loaded"


def _launcher() -> str:
    from .native import launcher

    return _library(launcher.NAME, launcher.built_with())


def _short_way() -> str:
    from .native import host, torches

    of = torches.here()
    return _library(host.name(of), host.built_with(of))


def _archs(devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the architectures of the GPUs at hand, or, without a GPU, of the kernels built ahead."""
    at_hand = {support.arch(torch.device(d["device"])) for d in devices if d["supported"]}
    if at_hand:
        return sorted(at_hand)
    try:
        stems = list(_stored(config.kernels_folder()))
    except (OSError, ValueError):
        return []  # The lines that describe the variable and the folder say why.
    return sorted({stem.split("-")[1] for stem in stems if stem.count("-") >= 2})


def collect() -> dict[str, Any]:
    """Find out everything that ``info`` shows, ready for JSON. No failure raises.

    Returns:
        ``versions`` maps a package to its version, None where absent. ``devices`` is a list of
        device, name, supported and reason. ``system`` and ``driver`` are text. ``tools``,
        ``variables`` (those that are read, and those that bear the package's prefix and that
        nothing reads), ``folders``, ``kernels`` (by architecture) and ``libraries`` map a
        name to text.
    """
    facts: dict[str, Any] = {"versions": _versions(), "devices": _devices()}
    looked_up: dict[str, dict[str, tuple[Callable[..., str], Any]]] = {
        "tools": {
            "nvcc": (_nvcc, ()),
            "C compiler": (_c_compiler, ()),
            "C++ compiler": (_cpp_compiler, ()),
        },
        "variables": {name: (_variable, (name,)) for name in (*config.VARIABLES, *OTHER_VARIABLES)}
        | {name: (_misspelt, (name,)) for name in config.unread()},
        "folders": {
            "cache": (lambda: _folder(config.own_cache_folder()), ()),
            "kernels built ahead": (lambda: _folder(config.kernels_folder()), ()),
        },
        "kernels": {arch: (_kernels, (arch,)) for arch in _archs(facts["devices"])},
        "libraries": {"launcher": (_launcher, ()), "short way of eager calls": (_short_way, ())},
    }
    facts["system"] = _guarded(_system)
    facts["driver"] = _guarded(_driver)
    with ThreadPoolExecutor() as pool:  # most of the look-ups wait for other programs
        running = {
            group: {
                name: pool.submit(_guarded, find_out, *given)
                for name, (find_out, given) in lines.items()
            }
            for group, lines in looked_up.items()
        }
        for group, lines in running.items():
            facts[group] = {name: future.result() for name, future in lines.items()}
    return facts


def lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Put the facts of :func:`collect` into (label, text), in the order in which they are shown."""
    versions = facts["versions"]
    shown = [(name, version or _ABSENT) for name, version in versions.items()]
    shown.remove(("cuda", versions["cuda"] or _ABSENT))
    shown.insert(2, ("system", facts["system"]))
    shown += [
        ("CUDA of torch", versions["cuda"] or "none: torch is built without it"),
        ("NVIDIA driver", facts["driver"]),
    ]
    for device in facts["devices"]:
        name = f"{device['name']}: " if device["name"] else ""
        verdict = "supported" if device["supported"] else "not supported"
        shown.append((device["device"], f"{name}{verdict}: {device['reason']}"))
    shown += [*facts["tools"].items(), *facts["variables"].items(), *facts["folders"].items()]
    shown += [(f"kernels of {arch}", text) for arch, text in facts["kernels"].items()]
    return [*shown, *facts["libraries"].items()]


def main(argv: Sequence[str]) -> int:
    """Run ``python -m mhc_ops info``, and return the exit status, 0."""
    parser = argparse.ArgumentParser(prog="python -m mhc_ops info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the lines")
    arguments = parser.parse_args(argv)
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    shown = lines(facts)
    width = max(len(label) for label, _ in shown)
    for label, text in shown:
        print(f"{label:{width}}  {' '.join(text.split())}")
    return 0
