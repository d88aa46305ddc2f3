"""Read switches and folders from the environment."""

import itertools
import re
from pathlib import Path

import pytest

from mhc_ops import config, store

FUSE, PRE, POST = "MHC_OPS_FUSE_POST_PRE", "MHC_OPS_TILELANG_PRE", "MHC_OPS_TILELANG_POST"
NO_JIT, TRUST = "MHC_OPS_DISABLE_JIT", "MHC_OPS_TRUST_CACHE"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in (*config.DEFAULTS, "MHC_OPS_KERNELS"):
        monkeypatch.delenv(name, raising=False)


def test_defaults():
    assert config.switches() == (False, True, True)
    assert not config.switches().fuse


@pytest.mark.parametrize("word", ["1", "true", "yes", "on", "ON", " True "])
@pytest.mark.parametrize("field", range(3))
def test_words_for_on(monkeypatch, field, word):
    monkeypatch.setenv((FUSE, PRE, POST)[field], word)
    assert config.switches()[field] is True


@pytest.mark.parametrize("word", ["0", "false", "no", "off", "OFF", " False "])
@pytest.mark.parametrize("field", range(3))
def test_words_for_off(monkeypatch, field, word):
    monkeypatch.setenv((FUSE, PRE, POST)[field], word)
    assert config.switches()[field] is False


@pytest.mark.parametrize("word", ["", "  "])
def test_empty_means_the_default(monkeypatch, word):
    for name in config.DEFAULTS:
        monkeypatch.setenv(name, word)
    assert {name: config.switch(name) for name in config.DEFAULTS} == config.DEFAULTS


@pytest.mark.parametrize("name", [FUSE, PRE, POST, NO_JIT, TRUST])
@pytest.mark.parametrize("word", ["2", "maybe", "-1", "none"])
def test_other_words_are_refused(monkeypatch, name, word):
    monkeypatch.setenv(name, word)
    with pytest.raises(ValueError, match=name) as error:
        config.switch(name)
    assert str(error.value) == f"{name}: expected 0 or 1, got {word!r}"


@pytest.mark.parametrize(("fuse", "pre", "post"), list(itertools.product("01", repeat=3)))
def test_fusing_needs_all_three(monkeypatch, fuse, pre, post):
    for name, word in zip((FUSE, PRE, POST), (fuse, pre, post), strict=True):
        monkeypatch.setenv(name, word)
    assert config.switches().fuse is (fuse == pre == post == "1")


def test_every_variable_is_in_the_table():
    assert list(config.DEFAULTS) == [FUSE, PRE, POST, NO_JIT, TRUST]
    assert config.WIRING == (FUSE, PRE, POST)
    for name, default in config.DEFAULTS.items():
        assert name.startswith(config.PREFIX)
        assert len(re.findall(rf"^    {name} +{int(default)} ", config.__doc__, re.M)) == 1


def test_no_other_variable_is_read():
    """Find in the docstring every name with the prefix that the package and setup.py have."""
    package = Path(config.__file__).parent
    names = set()
    for path in (*package.rglob("*.py"), package.parent / "setup.py"):
        names |= set(re.findall(r"MHC_OPS_\w+", path.read_text()))
    assert names - set(re.findall(r"MHC_OPS_\w+", config.__doc__)) == set()


# ----------------------------------------------------------------------------------------- folders


def test_the_folder_of_kernels(monkeypatch, tmp_path):
    for nothing in (None, "", "  "):
        if nothing is not None:
            monkeypatch.setenv("MHC_OPS_KERNELS", nothing)
        assert config.kernels_folder() == Path(config.__file__).with_name("packaged")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "launcher.json").touch()
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path / "kernels"))
    assert config.kernels_folder() == tmp_path / "kernels"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MHC_OPS_KERNELS", "~/kernels")
    assert config.kernels_folder() == tmp_path / "kernels"


@pytest.mark.parametrize(
    ("name", "lack"),
    [
        ("none", "where there is no folder"),
        ("empty", "which has no kernels"),
        ("file", "where there is no folder"),
    ],
)
def test_a_folder_that_has_no_kernels(monkeypatch, tmp_path, name, lack):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MHC_OPS_KERNELS", f"~/{name}")
    with pytest.raises(ValueError, match="MHC_OPS_KERNELS") as error:
        config.kernels_folder()
    assert str(error.value) == (
        f"MHC_OPS_KERNELS: expected a folder of kernels built ahead, got '~/{name}', {lack}; fill "
        f"it (python -m mhc_ops build --arch ARCH -o {tmp_path}/{name}), name another one, or "
        "unset the variable"
    )


# ------------------------------------------------------------------------------ misspelt variables


@pytest.fixture
def warnings(caplog):
    """Return the warnings so far of a process that has not yet looked at the environment."""
    config.warn_of_unread.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records]
    config.warn_of_unread.cache_clear()


@pytest.mark.parametrize("look", [config.switches, store.ahead_folder])
def test_a_misspelt_variable_is_warned_of_once(monkeypatch, warnings, look):
    monkeypatch.setenv("MHC_OPS_KERNEL", "/kernels")
    monkeypatch.setenv("MHC_OPS_XYZZY", "1")
    for _ in range(3):
        look()
    assert warnings() == [
        "the environment has MHC_OPS_KERNEL, which nothing reads; MHC_OPS_KERNELS was meant?",
        "the environment has MHC_OPS_XYZZY, which nothing reads",
    ]


def test_no_warning_of_variables_that_are_read(monkeypatch, warnings):
    for name in config.DEFAULTS:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MHC_OPS_AOT_ARCHS", "sm_90a")
    config.switches()
    assert not warnings()
