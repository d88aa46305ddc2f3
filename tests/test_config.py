"""The environment switches of the model wiring."""

import itertools

import pytest

from mhc_ops import config

FUSE, PRE, POST = "MHC_OPS_FUSE_POST_PRE", "MHC_OPS_TILELANG_PRE", "MHC_OPS_TILELANG_POST"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in config.DEFAULTS:
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
    assert config.switches() == tuple(config.DEFAULTS.values())


@pytest.mark.parametrize("name", [FUSE, PRE, POST])
@pytest.mark.parametrize("word", ["2", "maybe", "-1", "none"])
def test_other_words_are_refused(monkeypatch, name, word):
    monkeypatch.setenv(name, word)
    with pytest.raises(ValueError, match=name) as error:
        config.switches()
    assert str(error.value) == f"{name}: expected 0 or 1, got {word!r}"


@pytest.mark.parametrize(("fuse", "pre", "post"), list(itertools.product("01", repeat=3)))
def test_fusing_needs_all_three(monkeypatch, fuse, pre, post):
    for name, word in zip((FUSE, PRE, POST), (fuse, pre, post), strict=True):
        monkeypatch.setenv(name, word)
    assert config.switches().fuse is (fuse == pre == post == "1")


def test_every_variable_is_in_the_table():
    assert list(config.DEFAULTS) == [FUSE, PRE, POST]
    for name, default in config.DEFAULTS.items():
        assert name.startswith(config.PREFIX)
        rows = [line for line in config.__doc__.splitlines() if f"`{name}`" in line]
        assert len(rows) == 1
        assert f"`{int(default)}`" in rows[0]
