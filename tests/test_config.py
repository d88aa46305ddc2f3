"""Read switches from the environment, and refuse folders that others can write."""

import grp
import itertools
import os
import pwd
import re
import types
from pathlib import Path

import pytest

from mhc_ops import config

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


@pytest.fixture
def folder(tmp_path):
    """Make a folder of this user's alone, and one more in it."""
    (tmp_path / "cache" / "mhc_ops").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o755)
    return tmp_path / "cache" / "mhc_ops"


def refusal(folder):
    with pytest.raises(RuntimeError) as error:
        config.require_trusted(folder)
    return str(error.value)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_folder_of_ones_own_is_trusted(folder, mode):
    folder.chmod(mode)
    config.require_trusted(folder)
    config.require_trusted(folder / "not" / "there" / "yet")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o702, 0o1777])
def test_a_folder_that_everyone_can_write(folder, mode):
    folder.chmod(mode)
    assert refusal(folder) == (
        f"mhc: no kernel is loaded from {folder}: {folder} can be written by others (mode "
        f"{mode:04o}), and what lies there would run in this process; take the rights of "
        f"others (chmod go-w {folder}), let TILELANG_CACHE_DIR or MHC_OPS_KERNELS name a folder of "
        "your own, or set MHC_OPS_TRUST_CACHE=1"
    )


def test_a_folder_that_a_group_can_write(folder, monkeypatch):
    """Trust a group of the user's own name: systems that make it make it for the user alone."""
    folder.chmod(0o770)
    user = pwd.getpwuid(os.geteuid()).pw_name
    for name, trusted in ((user, True), ("engineers", False)):
        monkeypatch.setattr(grp, "getgrgid", lambda gid, n=name: types.SimpleNamespace(gr_name=n))
        if trusted:
            config.require_trusted(folder)
        else:
            assert f"{folder} can be written by others (mode 0770)" in refusal(folder)

    def unknown(gid):
        raise KeyError(gid)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert f"{folder} can be written by others (mode 0770)" in refusal(folder)


def test_a_folder_of_another_user(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(folder).st_uid + 4321)
    if os.stat(folder).st_uid == 0:
        os.chown(folder, 1234, -1)
    owner = os.stat(folder).st_uid
    assert f"{folder} belongs to another user (uid {owner})" in refusal(folder)


def test_a_folder_above_counts(folder):
    above = folder.parent
    above.chmod(0o777)
    assert f"loaded from {folder}: {above} can be written by others" in refusal(folder)
    assert f"{above} can be written by others" in refusal(folder / "not" / "there")
    above.chmod(0o1777)  # /tmp has this mode.
    config.require_trusted(folder)


def test_a_link_is_followed(folder, tmp_path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (folder / "link").symlink_to(open_to_all)
    assert f"{open_to_all} can be written by others" in refusal(folder / "link")


def test_the_switch_trusts_every_folder(folder, monkeypatch):
    folder.chmod(0o777)
    monkeypatch.setenv(TRUST, "1")
    config.require_trusted(folder)


def test_the_folder_of_kernels(folder, monkeypatch):
    assert config.kernels_folder() == Path(config.__file__).with_name("packaged")
    monkeypatch.setenv("MHC_OPS_KERNELS", str(folder))
    assert config.kernels_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="can be written by others"):
        config.kernels_folder()
