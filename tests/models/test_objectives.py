"""The attention mask against its definition (method: arXiv 2306.07346, figure 1), for random sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mapet.errors import MapetError
from mapet.models.objectives import MAPET, MIM, OBJECTIVES, PIM, get_objective
from mapet.models.packing import attention_mask, segment_lengths
from tests.refused import refused

sizes = st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(1, 20))  # prefix, c, p


def blocks(objective, prefix, c, p):
    """(row segment, column segment) -> its block of the table."""
    lengths = segment_lengths(objective, prefix, c, p)
    rows = attention_mask(objective, prefix, c, p).split(list(lengths.values()), dim=0)
    return {
        (row, column): block
        for row, part in zip(lengths, rows, strict=True)
        for column, block in zip(lengths, part.split(list(lengths.values()), dim=1), strict=True)
    }


@given(sizes)
def test_every_mapet_row_sees_exactly_the_full_sequence(size):
    prefix, c, p = size
    table = attention_mask(MAPET, prefix, c, p)
    assert (table.sum(dim=1) == prefix + c + p).all()


@given(sizes, st.sampled_from(list(OBJECTIVES)))
def test_no_row_sees_a_query(size, name):
    prefix, c, p = size
    if name == "pim" and prefix + c == 0:
        return
    result = blocks(OBJECTIVES[name], prefix, c, p)
    assert not any(block.any() for (_, column), block in result.items() if column == "query")


@given(sizes)
def test_mapet_ranks(size):
    """Target i attends to targets <= i and masks > i; query i to targets < i and masks >= i: to each index once."""
    prefix, c, p = size
    result = blocks(MAPET, prefix, c, p)
    for i in range(p):
        for j in range(p):
            assert result["target", "target"][i, j] == (j <= i)
            assert result["target", "mask"][i, j] == (j > i)
            assert result["query", "target"][i, j] == (j < i)
            assert result["query", "mask"][i, j] == (j >= i)
    for row in ("context", "target", "mask", "query"):
        assert result[row, "context"].all()
    assert result["context", "mask"].all() and result["mask", "mask"].all()
    assert not result["context", "target"].any() and not result["mask", "target"].any()


@given(sizes)
def test_mim_is_a_closed_part_of_mapet(size):
    prefix, c, p = size
    whole, part = blocks(MAPET, prefix, c, p), blocks(MIM, prefix, c, p)
    for pair, block in part.items():
        assert torch.equal(block, whole[pair])


@given(sizes)
def test_pim_is_mapet_without_mask_columns(size):
    prefix, c, p = size
    if prefix + c == 0:
        with pytest.raises(MapetError):
            attention_mask(PIM, prefix, c, p)
        return
    whole, part = blocks(MAPET, prefix, c, p), blocks(PIM, prefix, c, p)
    for pair, block in part.items():
        assert torch.equal(block, whole[pair])


def test_unknown_objective_suggests_the_nearest():
    with refused("'mapet'"):
        get_objective("mappet")
