"""A SentencePiece model trained on the spot, with PaliGemma's special tokens: 0 padding, 1 end, 2
beginning, 3 unknown.
"""

import pathlib

import sentencepiece

VOCAB_SIZE = 40


def train(folder: pathlib.Path) -> pathlib.Path:
    """Writes FOLDER/tokenizer.model."""
    sentences = [f"pick up the {c} {o} and put it away {i}" for i in range(30)
                 for c in ("red", "blue", "green") for o in ("cup", "block", "drawer")]  # fmt: skip
    (folder / "text.txt").write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB_SIZE, pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["\n"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "text.txt").unlink()
    return folder / "tokenizer.model"
