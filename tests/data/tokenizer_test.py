"""Prompts by bytes and by words: what the tokens say, and what becomes of those that do not fit."""

import logging

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from policymix.data import tokenizer
from policymix.sim import envs

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


_WORDS = st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8), max_size=9)


@hypothesis.given(_WORDS, st.integers(4, 2000))
def test_a_word_is_the_same_token_wherever_it_stands(words, vocab_size):
    coder = tokenizer.WordTokenizer(10, vocab_size)
    tokens, mask = coder.encode([" ".join(words), *words])
    count = len(" ".join(words).split())
    assert mask.sum(axis=1).tolist() == [count, *(len(word.split()) for word in words)]
    assert tokens[0, :count].tolist() == [int(row[0]) for row in tokens[1:]]
    assert (tokens[~mask] == 0).all()
    assert ((tokens[mask] >= 3) & (tokens[mask] < vocab_size)).all()


def test_case_and_the_newline_of_a_prompt_say_nothing():
    coder = tokenizer.WordTokenizer(4, 1024)
    first, second = coder.encode(["Window open\n", "window  OPEN"])[0].tolist()
    assert first == second
    assert first[0] != first[1]
    assert first[2:] == [0, 0]


def test_too_many_words_are_cut_and_named_once(caplog):
    coder = tokenizer.WordTokenizer(2, 1024)
    with caplog.at_level(logging.WARNING):
        tokens, mask = coder.encode(["plate slide back", "plate slide"])
        coder.encode(["plate slide back"])
    assert tokens[0].tolist() == tokens[1].tolist()
    assert mask.all()
    assert len(caplog.records) == 1
    assert "'plate slide back' has 3 tokens and is cut at max_token_len=2" in caplog.text


def test_words_known_beforehand():
    """Whoever trained on these tokens needs them again."""
    tokens, _ = tokenizer.WordTokenizer(3, 1024).encode(["push", "door open"])
    assert tokens.tolist() == [[942, 0, 0], [649, 206, 0]]


def test_the_words_of_meta_worlds_tasks_are_told_apart():
    words = sorted({w for name in envs.TASKS["metaworld"] for w in name[:-3].split("-")})
    tokens, _ = tokenizer.WordTokenizer(1, 1024).encode(words)
    assert len(words) > 40
    assert len(set(tokens[:, 0].tolist())) == len(words)


def test_a_vocabulary_without_room_for_words_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 3; words need more than 3"):
        tokenizer.WordTokenizer(8, 3)
