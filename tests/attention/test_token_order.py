import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsurgery.attention.hybrid import token_order
from jsurgery.attention.token_order import TokenOrder
from jsurgery.errors import InputError


def softmax_tokens(num_tokens, rate, tokens_per_frame=None):
    """The set T_S by its definition, token by token."""
    kept = set()
    for token in range(num_tokens):
        offset = 0 if tokens_per_frame is None else token // tokens_per_frame
        if (token + offset) % rate == 0:
            kept.add(token)
    return kept


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 600, 601, 1575])
@pytest.mark.parametrize("rates", [(1, 2, 4, 8), (8, 2), (1, 3, 12), (2, "linear"), ("linear",), (1,)])
def test_softmax_tokens_of_every_rate_are_a_prefix(num_tokens, rates):
    order = TokenOrder(num_tokens, rates)
    assert sorted(order.permutation) == list(range(num_tokens))
    for rate in rates:
        if rate == "linear":
            assert order.num_softmax(rate) == 0
            continue
        count = order.num_softmax(rate)
        assert count == math.ceil(num_tokens / rate)
        assert set(order.permutation[:count]) == softmax_tokens(num_tokens, rate)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(frames=st.integers(1, 9), tokens_per_frame=st.integers(1, 70), step=st.sampled_from([2, 3]))
def test_staggered_softmax_tokens_are_a_prefix(frames, tokens_per_frame, step):
    num_tokens = frames * tokens_per_frame
    rates = (1, step, step**2, step**3)
    order = TokenOrder(num_tokens, rates, "staggered", tokens_per_frame)
    by_rows = TokenOrder(num_tokens, rates, "staggered_rows", tokens_per_row=tokens_per_frame)
    for rate in rates:
        kept = softmax_tokens(num_tokens, rate, tokens_per_frame)
        assert set(order.permutation[: order.num_softmax(rate)]) == kept
        assert set(by_rows.permutation[: by_rows.num_softmax(rate)]) == kept


def test_only_staggered_sites_differ_between_frames():
    def sites(lattice):
        order = TokenOrder(5 * 24, (8,), lattice, 24)
        kept = order.permutation[: order.num_softmax(8)]
        return [tuple(kept[kept // 24 == frame] % 24) for frame in range(5)]

    assert len(set(sites("strided"))) == 1
    assert len(set(sites("staggered"))) == 5


def test_a_lattice_staggered_by_rows_keeps_no_whole_columns():
    """On the grid of Wan2.2 5B at 704x1280, whose width every rate divides, it keeps as many tokens of each column."""
    frames, height, width = 3, 22, 40

    def per_column(lattice):
        order = token_order((frames, height, width), (1, 2, 4, 8), lattice)
        assert order.num_softmax(8) == frames * height * width // 8
        return np.bincount(order.permutation[: order.num_softmax(8)] % width, minlength=width)

    for lattice in ("strided", "staggered"):
        assert set(per_column(lattice)) == ({0, frames * height} if lattice == "strided" else {0, height})
    assert set(per_column("staggered_rows")) <= {frames * height // 8, frames * height // 8 + 1}


def test_permutation_by_hand():
    order = TokenOrder(9, (1, 2, 4))
    np.testing.assert_array_equal(order.permutation, [0, 4, 8, 2, 6, 1, 3, 5, 7])
    assert [order.num_softmax(rate) for rate in (1, 2, 4)] == [9, 5, 3]


@pytest.mark.parametrize("lattice", ["strided", "staggered"])
def test_inverse_undoes_the_permutation(lattice):
    order = TokenOrder(105, (2, 4), lattice, 35)
    tokens = np.arange(105) * 3
    assert (tokens[order.permutation] != tokens).any()
    np.testing.assert_array_equal(tokens[order.permutation][order.inverse], tokens)


@pytest.mark.parametrize("lattice", ["strided", "staggered"])
@pytest.mark.parametrize("shards", [2, 3, 8, 50])
@pytest.mark.parametrize(("num_tokens", "rates"), [(120, (1, 2, 4, 8)), (105, (2, 4)), (105, (1, 3)), (7, (8,))])
def test_softmax_tokens_are_a_prefix_of_every_shard(num_tokens, rates, shards, lattice):
    frame = {120: 24, 105: 35, 7: 7}[num_tokens]
    order = TokenOrder(num_tokens, rates, lattice, frame, shards=shards)
    valid = np.ones(len(order.permutation), bool) if order.valid is None else order.valid
    sharded, valid = order.permutation.reshape(shards, -1), valid.reshape(shards, -1)
    assert sorted(sharded[valid]) == list(range(num_tokens))
    np.testing.assert_array_equal(order.permutation[order.inverse], np.arange(num_tokens))
    for rate in (1, *rates):
        count = order.num_softmax(rate)
        kept = sharded[:, :count][valid[:, :count]]
        assert set(kept) == softmax_tokens(num_tokens, rate, frame if lattice == "staggered" else None)
        # Each zone adds at most one token of padding per shard.
        assert 0 <= shards * count - len(kept) < shards * (len(rates) + 1)


def test_permutation_of_two_shards_by_hand():
    order = TokenOrder(9, (1, 2, 4), shards=2)
    np.testing.assert_array_equal(order.permutation, [0, 4, 2, 1, 3, 8, 0, 6, 5, 7])
    assert order.valid is not None and np.flatnonzero(~order.valid).tolist() == [6]
    assert [order.num_softmax(rate) for rate in (1, 2, 4)] == [5, 3, 2]
    assert TokenOrder(8, (1, 2), shards=2).valid is None


def test_equal_orders_are_equal_and_hashable():
    assert TokenOrder(8, [1, 2]) == TokenOrder(8, (1, 2))
    assert hash(TokenOrder(8, [1, 2])) == hash(TokenOrder(8, (1, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_tokens=8, rates=(1, 2, 3)), "2 and 3"),
        (dict(num_tokens=8, rates=(0,)), "found 0"),
        (dict(num_tokens=8, rates=("cubic",)), "cubic"),
        (dict(num_tokens=0), "found 0"),
        (dict(num_tokens=8, lattice="hexagonal"), "hexagonal"),
        (dict(num_tokens=8, shards=0), "shards: .* found 0"),
        (dict(num_tokens=8, lattice="staggered"), "found None"),
        (dict(num_tokens=8, lattice="staggered", tokens_per_frame=3), "found 3"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        TokenOrder(**arguments)


def test_a_rate_outside_the_chain_is_refused():
    with pytest.raises(InputError, match="found 3"):
        TokenOrder(8, (2, 4)).num_softmax(3)
