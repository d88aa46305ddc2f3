"""Run all four tests of torch.library.opcheck on every op and every form of its arguments."""

import pytest
import torch

from helpers import OPS, overload, samples, split

FORMS = [(op, form) for op in OPS for form in samples(op, "cpu")]
ALL_TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def test_no_opcheck_test_is_left_out():
    from torch.testing._internal.optests import generate_tests

    assert set(generate_tests.DEFAULT_TEST_UTILS) == set(ALL_TESTS)


@pytest.mark.parametrize(("op", "form"), FORMS)
def test_opcheck(op, form, device):
    args, kwargs = split(op, samples(op, device)[form])
    if form != "requires_grad":
        results = torch.library.opcheck(overload(op), args, kwargs, test_utils=ALL_TESTS)
        assert results == dict.fromkeys(ALL_TESTS, "SUCCESS")
        return
    # With grad mode on, this test would run the backward, which raises by contract.
    *forward_tests, traced = ALL_TESTS
    results = torch.library.opcheck(overload(op), args, kwargs, test_utils=forward_tests)
    with torch.no_grad():
        results |= torch.library.opcheck(overload(op), args, kwargs, test_utils=traced)
    assert results == dict.fromkeys(ALL_TESTS, "SUCCESS")
