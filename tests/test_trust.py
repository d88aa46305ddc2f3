"""Refuse folders and files that others can write, as folders of kernels have them."""

import grp
import os
import pwd
import types
from pathlib import Path

import pytest

from mhc_ops import config, store, trust
from mhc_ops.native import library

TRUST = "MHC_OPS_TRUST_CACHE"
NAME, FACTS = "launcher", {"machine": "x86_64"}
STRANGER = 4321
ADVICE = (
    "; or let TILELANG_CACHE_DIR or MHC_OPS_KERNELS name a folder of your own, or set "
    "MHC_OPS_TRUST_CACHE=1"
)
REASON = ", and what lies there would run in this process; "

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in (*config.DEFAULTS, "MHC_OPS_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path):
    """Make a folder of this user's alone, with one library and one more folder above it."""
    made = tmp_path / "cache" / "mhc_ops"
    made.mkdir(parents=True)
    made.parent.chmod(0o755)
    store.save(made, NAME, store.LIBRARY, FACTS, b"library")
    return made


@pytest.fixture
def open_to_all(tmp_path):
    """Make a folder that everyone can write."""
    made = tmp_path / "open"
    made.mkdir()
    made.chmod(0o777)
    return made


def refusal(folder):
    with pytest.raises(RuntimeError) as error:
        trust.require_folder(folder)
    return str(error.value)


def refused(folder):
    with pytest.raises(RuntimeError) as error:
        store.find(folder, NAME, store.LIBRARY, FACTS)
    return str(error.value)


def is_found(folder):
    return store.find(folder, NAME, store.LIBRARY, FACTS) is not None


# ----------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_folder_of_ones_own_is_trusted(folder, mode):
    folder.chmod(mode)
    trust.require_folder(folder)
    trust.require_folder(folder / "not" / "there" / "yet")
    assert trust.exposure(folder) is None


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o702, 0o1777])
def test_a_folder_that_everyone_can_write(folder, mode):
    folder.chmod(mode)
    assert refusal(folder) == (
        f"mhc: no kernel is loaded from {folder}: {folder} can be written by others (mode "
        f"{mode:04o}){REASON}type: chmod go-w {folder}{ADVICE}"
    )


def test_a_folder_that_a_group_can_write(folder, monkeypatch):
    """Trust a group of the user's own name: systems that make it make it for the user alone."""
    folder.chmod(0o770)
    user = pwd.getpwuid(os.geteuid()).pw_name
    for name, trusted in ((user, True), ("engineers", False)):
        monkeypatch.setattr(grp, "getgrgid", lambda gid, n=name: types.SimpleNamespace(gr_name=n))
        if trusted:
            trust.require_folder(folder)
        else:
            assert f"{folder} can be written by others (mode 0770)" in refusal(folder)

    def unknown(gid):
        raise KeyError(gid)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert f"{folder} can be written by others (mode 0770)" in refusal(folder)


@needs_root
def test_a_folder_of_another_user(folder):
    os.chown(folder, STRANGER, -1)
    assert f"{folder} belongs to another user (uid {STRANGER})" in refusal(folder)
    assert f"{REASON}type: chown 0 {folder};" in refusal(folder)
    folder.chmod(0o777)
    assert f"belongs to another user (uid {STRANGER}) and can be written by " in refusal(folder)
    assert f"type: chown 0 {folder} && chmod go-w {folder};" in refusal(folder)


@needs_root
def test_who_is_not_root_copies_what_another_user_owns(folder, monkeypatch):
    os.chown(folder, STRANGER, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert (
        f"{REASON}copy it to a folder of your own (cp -rL {folder} DIR), or as root type: chown "
        f"1234 {folder};" in refusal(folder)
    )


def test_what_root_owns_is_trusted(folder, monkeypatch):
    """Load from site-packages that root has filled, and as root from one's own folder."""
    if os.stat(folder).st_uid == 0:
        monkeypatch.setattr(os, "geteuid", lambda: 1234)
    trust.require_folder(folder)
    assert is_found(folder)


def test_a_read_only_file_system(folder, monkeypatch):
    """Advise a copy where neither chmod nor chown works."""
    folder.chmod(0o777)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_RDONLY))
    assert (
        f"{REASON}copy it to a folder of your own (cp -rL {folder} DIR), its file system is "
        "read-only;" in refusal(folder)
    )


def test_a_folder_above_counts(folder):
    above = folder.parent
    above.chmod(0o777)
    assert f"loaded from {folder}: {above} can be written by others" in refusal(folder)
    assert f"{above} can be written by others" in refusal(folder / "not" / "there")
    above.chmod(0o1777)  # /tmp has this mode.
    trust.require_folder(folder)


def test_a_link_is_followed(folder, open_to_all):
    (folder / "link").symlink_to(open_to_all)
    assert f"{open_to_all} can be written by others" in refusal(folder / "link")


def test_every_link_on_the_way_counts(folder, open_to_all, tmp_path):
    """Refuse a way through a folder where others can turn a link elsewhere."""
    (open_to_all / "middle").symlink_to(folder)
    start = tmp_path / "start"
    start.symlink_to(open_to_all / "middle")
    assert f"from {start}: {open_to_all} can be written by others" in refusal(start)
    open_to_all.chmod(0o755)
    trust.require_folder(start)
    (tmp_path / "relative").symlink_to("open/../start")
    trust.require_folder(tmp_path / "relative")


@needs_root
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_another_user_owns_in_a_shared_folder(folder, open_to_all, kind):
    """Refuse in /tmp and the like what its owner can put something else in the place of."""
    open_to_all.chmod(0o1777)
    step = open_to_all / "step"
    if kind == "link":
        step.symlink_to(folder.parent)
    else:
        (step / folder.name).mkdir(parents=True)
    trust.require_folder(step / folder.name)
    os.chown(step, STRANGER, -1, follow_symlinks=False)
    assert f"{step} belongs to another user (uid {STRANGER})" in refusal(step / folder.name)
    option = "-h " if kind == "link" else ""
    assert f"type: chown {option}0 {step};" in refusal(step / folder.name)


def test_a_loop_of_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((OSError, RuntimeError), match=r"loop|symbolic links"):
        trust.require_folder(tmp_path / "loop")


def test_the_switch_trusts_everything(folder, monkeypatch):
    folder.chmod(0o777)
    (folder / "launcher.so").chmod(0o777)
    monkeypatch.setenv(TRUST, "1")
    trust.require_folder(folder)
    assert is_found(folder)


# ------------------------------------------------------------------------------------------- files

FILES = ("launcher.so", "launcher.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mode", [0o666, 0o646, 0o602, 0o664])
def test_a_file_that_others_can_write(folder, monkeypatch, name, mode):
    def unknown(gid):
        raise KeyError(gid)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    file = folder / name
    file.chmod(mode)
    assert refused(folder) == (
        f"mhc: no kernel is loaded from {file}: {file} can be written by others (mode "
        f"{mode:04o}){REASON}type: chmod -R go-w {folder}{ADVICE}"
    )
    assert trust.exposure(folder) == f"{file} can be written by others (mode {mode:04o})"
    file.chmod(mode & ~0o022)
    assert is_found(folder)


@needs_root
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_user(folder, name):
    os.chown(folder / name, STRANGER, -1)
    assert f"{folder / name} belongs to another user (uid {STRANGER})" in refused(folder)
    assert f"type: chown -R 0 {folder};" in refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_a_link(folder, open_to_all, name):
    """Trust a link that leads into a folder of one's own, and no other."""
    own = folder.parent / "own"
    own.mkdir()
    for target in (own, open_to_all):
        os.replace((folder / name).resolve(), target / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target / name)
        if target == own:
            assert is_found(folder)
            assert trust.exposure(folder) is None
    said = f"{open_to_all} can be written by others (mode 0777)"
    assert f"from {folder / name}: {said}{REASON}type: chmod go-w {open_to_all}" in refused(folder)
    assert trust.exposure(folder) == said
    open_to_all.chmod(0o755)
    (open_to_all / name).chmod(0o666)
    assert f"type: chmod go-w {open_to_all / name};" in refused(folder)


def test_the_file_that_was_opened_counts(folder, monkeypatch):
    """Look at the opened file: another process may put one into its place in between."""
    file = folder / "launcher.so"
    opened = os.open

    def swap(path, *rest):
        descriptor = opened(path, *rest)
        if Path(path) == file:
            fresh = folder / "fresh"
            fresh.write_bytes(b"library")
            os.replace(fresh, file)
        return descriptor

    file.chmod(0o666)
    monkeypatch.setattr(os, "open", swap)
    assert f"{file} can be written by others (mode 0666)" in refused(folder)


def test_a_file_that_becomes_a_link_is_not_followed(folder, open_to_all, monkeypatch, caplog):
    (open_to_all / "launcher.so").write_bytes(b"library")
    file, opened = folder / "launcher.so", os.open

    def swap(path, *rest):
        if Path(path) == file:
            file.unlink()
            file.symlink_to(open_to_all / "launcher.so")
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", swap)
    monkeypatch.setattr(store, "_warned", set())
    assert not is_found(folder)
    assert "it cannot be read: " in caplog.text


def test_a_pipe_is_not_waited_for(folder, monkeypatch, caplog):
    monkeypatch.setattr(store, "_warned", set())
    (folder / "launcher.so").unlink()
    os.mkfifo(folder / "launcher.so")
    assert not is_found(folder)
    assert "it is no regular file" in caplog.text


def test_files_of_the_package(folder, monkeypatch):
    """Let a packaged file be as open as the package's code, which runs in the process anyway."""
    code = folder.parent / "trust.py"
    code.touch()
    monkeypatch.setattr(config, "PACKAGED", folder)
    monkeypatch.setattr(trust, "__file__", str(code))
    folder.chmod(0o777)  # Whoever can write this folder can also change the package.
    assert is_found(folder)
    (folder / "launcher.so").chmod(0o666)
    assert f"{folder / 'launcher.so'} can be written by others" in refused(folder)
    code.chmod(0o666)
    assert is_found(folder)


@needs_root
def test_files_of_a_package_of_another_user(folder, monkeypatch):
    code = folder.parent / "trust.py"
    code.touch()
    monkeypatch.setattr(config, "PACKAGED", folder)
    monkeypatch.setattr(trust, "__file__", str(code))
    for path in (code, *folder.iterdir()):
        os.chown(path, STRANGER, -1)
    assert is_found(folder)
    os.chown(code, 0, -1)
    assert f"belongs to another user (uid {STRANGER})" in refused(folder)


@pytest.mark.parametrize("place", ["ahead", "cached"])
def test_native_libraries(folder, monkeypatch, place):
    """Refuse a launcher or host library that others can write, and build none beside it."""
    if place == "ahead":
        monkeypatch.setenv("MHC_OPS_KERNELS", str(folder))
    else:
        monkeypatch.setenv("TILELANG_CACHE_DIR", str(folder.parent))
        cached = folder / f"{NAME}-{store.digest(FACTS)}"
        store.save(cached, NAME, store.LIBRARY, FACTS, b"library")
        folder = cached
    assert library.obtain(NAME, FACTS, ["false"]) == folder / "launcher.so"
    (folder / "launcher.so").chmod(0o757)
    with pytest.raises(RuntimeError, match=r"launcher\.so can be written by others \(mode 0757\)"):
        library.obtain(NAME, FACTS, ["false"])


def test_a_build_reads_what_it_does_not_load(folder):
    """Let a build keep the files of a folder that several users fill."""
    (folder / "launcher.so").chmod(0o666)
    library.build(folder, NAME, FACTS, ["false"])
