"""Spellings of kinds, their names in plans, what checkpoints hold of them, and the token order that they need."""

import numpy as np
import pytest

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds.registry import (
    check_rates,
    kind_of,
    parse_block_budget,
    plan_of_budget,
    rate_key,
    rate_name,
)
from jsurgery.config import base, validate
from jsurgery.errors import InputError

RATES = ["linear", "C3O1", 8, "B3O1", 1, "C12O0", 2, "S10B16", "S5"]


def test_every_kind_is_what_its_spellings_say():
    for rate in RATES:
        kind = kind_of(rate)
        assert kind.rate == rate and kind_of(kind.rate) == kind
        assert parse_block_budget(f"15{kind.plan_name}") == ((15, rate),)
    assert list(map(rate_name, RATES)) == ["linear", "C3O1", "R8", "B3O1", "softmax", "C12O0", "R2", "S10B16", "S5"]
    assert sorted(RATES, key=rate_key) == [1, 2, 8, "B3O1", "C12O0", "C3O1", "S10B16", "S5", "linear"]
    assert (kind_of("C3O1").chunk, kind_of("C3O1").overlap, kind_of("C3O1").causal) == (3, 1, True)
    assert not kind_of("B3O1").causal
    assert (kind_of("S10B16").percent, kind_of("S10B16").blocks, kind_of("S5").blocks) == (10, (16, 16), (128, 64))


OTHERS = [
    "C0O1", "C3", "C3O", "C03O1", "c3O1", "C3O1 ", "C3O-1", "D3O1", "S0", "S100", "S10B0", "S05", "S10B", "2", "R2",
    True, 2.0, None, [1], 0, -2,
]  # fmt: skip


@pytest.mark.parametrize("rate", OTHERS)
def test_other_spellings_are_refused(rate):
    with pytest.raises(InputError, match="expected integers from 1 or 'linear' or names like 'C3O1'"):
        kind_of(rate)
    with pytest.raises(InputError, match="config.plan.rates: expected integers from 1"):
        check_rates("config.plan.rates", [2, rate])


def test_budgets_may_mix_kinds():
    assert parse_block_budget("8R2+4C3O1+1Rlinear") == ((8, 2), (4, "C3O1"), (1, "linear"))
    assert plan_of_budget(((1, 2), (2, "C3O1")), 4) == (2, "C3O1", "C3O1", 1)
    assert plan_of_budget(((3, 2), (2, "C3O1")), 4) is None
    for text in ("8R2+", "+4C3O1", "8R2,4C3O1", "C3O1", "8R2 + 4C3O1", "8", "8r2", "8C3", "0.6"):
        assert parse_block_budget(text) is None, text


def test_checkpoints_have_the_oldest_format_that_holds_them():
    """Format 1 is what version 0.1 wrote and reads, field by field."""
    phi = {"degree": 2, "layers": 2, "activation": "relu"}
    fields = {"rates": (2, 1, "linear"), "chain": (1, 2, 4, 8), "lattice": "strided", "stabilizer": "lse"}
    format_1 = {"format_version": 1, **fields, "linear_branch": True, "feature_map": phi}
    assert HybridConfig((2, 1, "linear")).to_json() == format_1
    mixed = HybridConfig((2, 1, "C3O1"))
    assert mixed.to_json() == format_1 | {"format_version": 2, "rates": (2, 1, "C3O1")}
    assert HybridConfig.from_json(mixed.to_json(), "config.json") == mixed
    with pytest.raises(InputError, match="hybrid.rates: format 1 knows numbers and 'linear', found 'C3O1'"):
        HybridConfig.from_json(mixed.to_json() | {"format_version": 1}, "config.json")
    for rate in (3, "C0O1", "linear"):
        with pytest.raises(InputError, match=f"config.json: hybrid.rates: expected .* found {rate!r}"):
            HybridConfig.from_json(mixed.to_json() | {"rates": [rate], "linear_branch": False}, "config.json")


def test_tokens_are_in_prefix_order_where_a_block_needs_it():
    grid = (3, 2, 4)
    assert HybridConfig((1, "C2O1", "B1O0")).token_order(grid) is None
    order = HybridConfig((1, "C2O1", 2)).token_order(grid)
    assert order is not None and (order.permutation != np.arange(24)).any()


def test_the_loss_of_a_kind_must_be_one_of_its_own():
    config = base()
    config.distill.loss, config.hybrid.rates, config.plan.rates = "attention", (2, "C3O1"), (1, 2)
    with pytest.raises(
        InputError, match="config.distill.loss: 'C3O1' in config.hybrid.rates can be distilled by value"
    ):
        validate(config)
