"""Byte prompts: what the tokens spell, and what becomes of those that do not fit."""

import logging

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from policymix.data import tokenizer

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@hypothesis.given(st.lists(_TEXT, max_size=4))
def test_tokens_spell_the_prompt(prompts):
    tokens, mask = tokenizer.ByteTokenizer(128).encode(prompts)
    assert tokens.shape == mask.shape == (len(prompts), 128)
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)
    for prompt, row, real in zip(prompts, tokens, mask, strict=True):
        count = real.sum()
        assert real[:count].all()
        assert (row[count:] == 0).all()
        assert row[0] == 1
        text = bytes((row[1:count] - 3).tolist()).decode()
        assert text == prompt
        assert row.max() < tokenizer.ByteTokenizer.vocab_size


def test_known_ids():
    tokens, mask = tokenizer.ByteTokenizer(8).encode(["a b\nc"])
    assert tokens.tolist() == [[1, 100, 35, 101, 13, 102, 0, 0]]
    assert mask.tolist() == [[True] * 6 + [False] * 2]
    assert tokenizer.ByteTokenizer.vocab_size == 259


def test_a_long_prompt_is_cut_and_named_once(caplog):
    coder = tokenizer.ByteTokenizer(5)
    with caplog.at_level(logging.WARNING):
        tokens, mask = coder.encode(["abcdef", "abcd", "abcdef"])
        coder.encode(["abcdef"])
    assert tokens.tolist() == [[1, 100, 101, 102, 103]] * 3
    assert mask.all()
    assert len(caplog.records) == 1  # "abcd" just fits
    assert "'abcdef'" in caplog.text
    assert "max_token_len=5" in caplog.text


def test_refuses_what_is_no_list_of_prompts():
    with pytest.raises(ValueError, match="list of prompts"):
        tokenizer.ByteTokenizer(8).encode("push")
    with pytest.raises(ValueError, match="at least 1"):
        tokenizer.ByteTokenizer(0)
