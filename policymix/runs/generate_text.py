"""Text from a picture and a prompt, by PaliGemma alone or by the PaliGemma within a π0."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix.checkpoints import layout, store
from policymix.data import pictures, tokenizer
from policymix.models import pi0, recognize, text
from policymix.runs import encoding, policies
from policymix.structs import Observation

_LONGEST = 512  # tokens of a prompt: longer ones are cut, with a warning


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for. `image`: "" asks without a picture."""

    checkpoint: str
    image: str
    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "bfloat16"
    dry_run: bool = False


def generate(config: ml_collections.ConfigDict, request: Request) -> str:
    """Prints what the model says, and returns it.

    Raises:
      ValueError, OSError: no checkpoint, no tokenizer, or no picture.
    """
    _check(request)
    given = policies.optional_model(config)
    header = store.open_params(request.checkpoint, given.siglip_heads if given else None)
    coder = _tokenizer(config.data.tokenizer, request.checkpoint)
    tokens, kept = coder.encode([request.prompt + "\n"])
    length = int(kept.sum())
    header = policies.cut_vocabulary(recognize.paligemma(header), coder.vocab_size)
    model = _model(given, header, request, length)
    if model.vocab_size != coder.vocab_size:
        raise ValueError(
            f"{request.checkpoint} has {model.vocab_size} tokens, the tokenizer "
            f"{coder.vocab_size}: it is another model's"
        )
    images = {}
    if request.image:
        images = {"image": pictures.read_file(request.image, model.image_resolution)[None]}
    observation = Observation(
        images=images,
        image_masks={name: np.ones(1, bool) for name in images},
        proprio=np.zeros((1, model.proprio_dim), np.float32),  # nothing looks at it
        prompt_tokens=tokens[:, :length],
        prompt_mask=kept[:, :length],
    )
    told = "a picture and " if images else ""
    print(f"{request.checkpoint}: {recognize.describe(header)}; {told}{length} tokens of prompt")
    if request.dry_run:
        print("dry run: nothing was computed")
        return ""
    params = policies.read_params(header, request.dtype)
    started = time.monotonic()
    written, real = text.generate(
        model,
        params,
        observation,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        key=jax.random.key(request.seed),
        eos_id=coder.eos_id,
    )
    said = coder.decode(np.asarray(written[0])[np.asarray(real[0])])
    print(said)
    count, seconds = int(real.sum()), time.monotonic() - started
    print(f"({count} tokens in {seconds:.1f} s, compilation included)")
    return said


def _check(request: Request) -> None:
    if request.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {request.max_new_tokens}; at least 1 is needed")
    if not 0 <= request.temperature < float("inf"):
        raise ValueError(f"--temperature is {request.temperature}; expected 0 or more")


def _model(
    given: pi0.Pi0Config | None, header: Mapping[str, Any], request: Request, length: int
) -> pi0.Pi0Config:
    """The model of the checkpoint, or of the config where one is given, with one camera."""
    name, told = request.checkpoint, recognize.fields(header)
    if "paligemma_variant" not in told or "vocab_size" not in told:
        raise ValueError(f"{name} has no language model with a vocabulary: it cannot write")
    if request.image and "siglip_variant" not in told:
        raise ValueError(f"{name} has no vision tower: leave --image out")
    cameras = ("image",) if request.image else ()
    fields = {"image_keys": cameras, "max_token_len": length, "dtype": request.dtype}
    if given is None:
        return recognize.model(header, **fields)
    model = dataclasses.replace(given, vocab_size=told["vocab_size"], **fields)
    recognize.check(recognize.paligemma(pi0.shapes(model)), header, name, whole=False)
    return model


def _tokenizer(name: str, checkpoint: str) -> tokenizer.SentencePieceTokenizer:
    """The one that the config names; where that names none of PaliGemma's, the tokenizer.model
    beside the checkpoint, as Hugging Face publishes it, else PaliGemma's from cache or hub.
    """
    if name in ("bytes", "words"):  # of small policies, which have nothing to say
        beside = layout.find(checkpoint).directory / "tokenizer.model"
        name = str(beside) if beside.is_file() else "paligemma"
    return encoding.sentencepiece(name, _LONGEST)
