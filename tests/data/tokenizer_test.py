"""Prompts by SentencePiece, bytes and words: what they say, and what is cut."""

import logging

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from policymix.data import tokenizer
from policymix.sim import envs
from tests import small_sentencepiece

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


# SentencePiece


@pytest.fixture(scope="session")
def paligemma_like(tmp_path_factory):
    return small_sentencepiece.train(tmp_path_factory.mktemp("sentencepiece"))


def test_sentencepiece_begins_and_spells(paligemma_like):
    coder = tokenizer.SentencePieceTokenizer(paligemma_like, 24)
    tokens, mask = coder.encode(["pick up the red cup\n", "put it away"])
    kept = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    assert all(row[0] == 2 for row in kept)
    assert coder.decode(kept[0][1:]).rstrip() == "pick up the red cup"
    assert coder.decode(kept[1][1:]) == "put it away"
    assert (tokens[~mask] == 0).all()
    assert (coder.vocab_size, coder.eos_id) == (40, 1)


def test_a_newline_at_the_end_is_encoded_apart_as_openpi_does(paligemma_like):
    given = sentencepiece.SentencePieceProcessor(model_file=str(paligemma_like))
    expected = given.encode("put it away", add_bos=True) + given.encode("\n")
    tokens, mask = tokenizer.SentencePieceTokenizer(paligemma_like, 24).encode(["put it away\n"])
    assert tokens[mask].tolist() == expected
    whole = "Task: put it away, State: 1 2;\nAction: "  # one piece of text, as for π0.5
    tokens, mask = tokenizer.SentencePieceTokenizer(paligemma_like, 60).encode([whole])
    assert tokens[mask].tolist() == given.encode(whole, add_bos=True)


def test_a_long_sentencepiece_prompt_is_cut_and_quoted(paligemma_like, caplog):
    with caplog.at_level(logging.WARNING):
        _, mask = tokenizer.SentencePieceTokenizer(paligemma_like, 4).encode(["pick up the cup"])
    assert mask.all()
    assert "'pick up the cup'" in caplog.text
    assert "is cut at max_token_len=4" in caplog.text


def test_a_tokenizer_that_is_not_there_or_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.model does not exist"):
        tokenizer.SentencePieceTokenizer(tmp_path / "nowhere.model", 4)
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="broken.model cannot be read as a SentencePiece model"):
        tokenizer.SentencePieceTokenizer(tmp_path / "broken.model", 4)


def test_without_the_hub_the_message_says_how_to_get_it(monkeypatch):
    def unreachable(url):
        raise ConnectionError(f"{url} cannot be reached")

    monkeypatch.setattr(tokenizer.hub, "fetch", unreachable)
    with pytest.raises(
        ValueError,
        match=r"hf download google/paligemma.*config.data.tokenizer=P.*config.offline_rl.tokenizer",
    ):
        tokenizer.paligemma(48)
