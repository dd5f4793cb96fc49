"""Prompts → tokens: by PaliGemma's SentencePiece model, or by bytes or words for policies that come
without one.
"""

import logging
import os
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np
import sentencepiece

from policymix import hub

PAD_ID = 0
BOS_ID = 1
EOS_ID = 2  # never written; reserved as in PaliGemma, whose prompts end in a newline
_BYTE_OFFSET = 3

_log = logging.getLogger(__name__)


class ByteTokenizer:
    """UTF-8 bytes as tokens: 0 pad, 1 beginning, 2 reserved for the end, byte + 3.

    The beginning token stands in front; what else frames a prompt is `transforms.prompts`'
    business.

    Args:
      max_token_len: s, the length of every row; longer prompts are cut.
    """

    vocab_size = 256 + _BYTE_OFFSET  # the least that a model needs

    def __init__(self, max_token_len: int):
        if max_token_len < 1:
            raise ValueError(
                f"max_token_len is the tokens per prompt, at least 1; got {max_token_len}"
            )
        self.max_token_len = max_token_len
        self._cut: set[str] = set()  # prompts already warned about: training repeats them each step

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """b prompts → tokens int32 [b, s], mask bool [b, s] (false: padding).

        A prompt that is too long is cut at s, which is logged once for each.

        Raises:
          ValueError: `prompts` is a single string.
        """
        if isinstance(prompts, str):
            raise ValueError(
                f"expected a list of prompts, got the string {prompts!r}; wrap it in []"
            )
        tokens = np.full((len(prompts), self.max_token_len), PAD_ID, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, prompt in enumerate(prompts):
            ids = self._ids(prompt)
            if len(ids) > self.max_token_len and prompt not in self._cut:
                self._cut.add(prompt)
                _log.warning(
                    "the prompt %r has %d tokens and is cut at max_token_len=%d",
                    prompt,
                    len(ids),
                    self.max_token_len,
                )
            kept = ids[: self.max_token_len]
            tokens[row, : len(kept)] = kept
            mask[row, : len(kept)] = True
        return tokens, mask

    def _ids(self, prompt: str) -> list[int]:
        return [BOS_ID, *(byte + _BYTE_OFFSET for byte in prompt.encode())]


class WordTokenizer(ByteTokenizer):
    """A token for each word: its CRC-32 modulo the vocabulary; 0 pad, 1 and 2 reserved.

    Short prompts make short sequences, which is what a small policy on a CPU needs; words that fall
    on the same token are the price, rare in vocabularies much larger than the words in use.

    Args:
      max_token_len: s, the length of every row; longer prompts are cut.
      vocab_size: of the model.
    """

    def __init__(self, max_token_len: int, vocab_size: int):
        super().__init__(max_token_len)
        if vocab_size <= _BYTE_OFFSET:
            raise ValueError(f"vocab_size is {vocab_size}; words need more than {_BYTE_OFFSET}")
        self.vocab_size = vocab_size

    def _ids(self, prompt: str) -> list[int]:
        words, buckets = prompt.lower().split(), self.vocab_size - _BYTE_OFFSET
        return [_BYTE_OFFSET + zlib.crc32(word.encode()) % buckets for word in words]


class SentencePieceTokenizer(ByteTokenizer):
    """PaliGemma's tokens, from its SentencePiece model.

    A newline at the end of a prompt is encoded apart, as OpenPI does; what it would be joined with
    otherwise depends on the vocabulary.

    Args:
      model: path of the .model file.
      max_token_len: s, the length of every row; longer prompts are cut.

    Raises:
      ValueError: no such file, or no SentencePiece model.
    """

    def __init__(self, model: str | os.PathLike, max_token_len: int):
        super().__init__(max_token_len)
        if not pathlib.Path(model).is_file():
            raise ValueError(f"the tokenizer {model} does not exist")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{model} cannot be read as a SentencePiece model: "
                f"{str(error).strip().splitlines()[-1]}"
            ) from error
        self.vocab_size = self._processor.vocab_size()

    def _ids(self, prompt: str) -> list[int]:
        text = prompt.removesuffix("\n")
        ids = self._processor.encode(text, add_bos=True)
        return ids + self._processor.encode("\n") if text != prompt else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._processor.decode([int(token) for token in tokens])

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self._processor.eos_id()


PALIGEMMA_MODELS = (  # the second after a login
    "gs://big_vision/paligemma_tokenizer.model",
    "hf://google/paligemma-3b-pt-224/tokenizer.model",
)


def paligemma(max_token_len: int) -> SentencePieceTokenizer:
    """PaliGemma's tokenizer, from the local cache or fetched into it.

    Raises:
      ValueError: it is not there and cannot be fetched; the message says how to get it.
    """
    troubles = []
    for url in PALIGEMMA_MODELS:
        try:
            path = hub.fetch(url)
            break
        except (OSError, ImportError) as error:
            troubles.append(error)
    else:
        raise ValueError(
            f"PaliGemma's tokenizer is not in the cache and cannot be fetched ({troubles[0]}). Get "
            f"{PALIGEMMA_MODELS[0]}, or, after `hf auth login` and accepting its licence, `hf "
            "download google/paligemma-3b-pt-224 tokenizer.model`, and pass "
            "--config.data.tokenizer=PATH (for a chunk-level learner --config.offline_rl.tokenizer)"
        ) from troubles[0]
    return SentencePieceTokenizer(path, max_token_len)
