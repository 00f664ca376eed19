"""Which dtype is fast on a processor: what its units say, and where they do not, a timing that is kept."""

import pytest

from lowres_ft import device


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Find a processor of some capabilities, on which products take so many seconds."""
    monkeypatch.setenv("LOWRES_FT_CACHE", str(tmp_path))
    timed = []

    def find(capabilities, taken=None):
        monkeypatch.setattr(device, "_capabilities", lambda: dict.fromkeys(capabilities, True))
        monkeypatch.setattr(device, "_timed_products", lambda: timed.append(taken) or taken)
        return device.find("cpu").dtype

    find.timed = timed
    return find


@pytest.mark.parametrize(("capabilities", "dtype"), [((), "float32"), (("amx_bf16", "avx512_bf16"), "bfloat16")])
def test_units_that_leave_no_doubt_are_not_timed(capabilities, dtype, processor):
    assert processor(capabilities) == dtype
    assert processor.timed == []


@pytest.mark.parametrize(("seconds", "dtype"), [(0.5, "bfloat16"), (1.7, "float32")])
def test_others_are_timed_once_and_the_choice_is_kept(seconds, dtype, processor):
    taken = {"float32": 1.0, "bfloat16": seconds}
    assert processor(("avx512_bf16",), taken) == dtype
    assert processor(("avx512_bf16",), {"float32": 1.0, "bfloat16": 2.2 - seconds}) == dtype
    assert processor.timed == [taken]


def test_products_are_timed_in_both():
    taken = device._timed_products()
    assert taken.keys() == {"float32", "bfloat16"}
    assert all(0 < seconds < 10 for seconds in taken.values())
