"""Dropout of the low-rank values: its mask, and its place in the kernels."""

import pytest
from test_kernels import each_backend, run_layer

from fedspine_edge import reference
from fedspine_edge.dropout import Dropout, DropoutStream

__all__ = ["each_backend"]  # a fixture


def test_the_words_are_those_that_random123_publishes():
    # Philox4x32-10 at counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    for word, value in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for threshold, kept in ((value, True), (value + 1, False)):
            factors = reference.dropout_factors(1, 4, Dropout(threshold / 2**32, 0))
            assert bool(factors[0, word]) is kept


@pytest.mark.parametrize(("tokens", "rank"), [(1, 1), (7, 3), (97, 8), (33, 33), (600, 16)])
def test_a_layer_with_dropout_matches_float64(each_backend, tokens, rank):
    run_layer(tokens, 40, 50, rank, dropout=Dropout(0.4, 3 << 32 | 5))


def test_a_mask_drops_its_rate_and_keeps_the_mean():
    factors = reference.dropout_factors(4000, 16, Dropout(0.1, 9))
    assert float((factors == 0).float().mean()) == pytest.approx(0.1, abs=0.005)
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.005)


def test_each_call_draws_another_mask_and_the_same_seed_the_same_ones():
    first, second = DropoutStream(0.5, 7), DropoutStream(0.5, 7)
    calls = [first.next() for _ in range(3)]
    assert len({call.key for call in calls}) == 3
    assert calls == [second.next() for _ in range(3)]
    assert DropoutStream(0.5, 8).next() != calls[0]
