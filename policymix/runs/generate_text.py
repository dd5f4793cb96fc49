"""Text from a picture and a prompt, by PaliGemma alone or by the PaliGemma within a π0."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import trees
from policymix.checkpoints import keymaps, layout, leaves, store
from policymix.data import pictures, tokenizer
from policymix.models import pi0, recognize, text
from policymix.runs import policies
from policymix.structs import Observation

_EMBEDDER = "PaliGemma/llm/embedder/input_embedding"
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
    header = store.open_params(request.checkpoint)
    coder = _tokenizer(config.data.tokenizer, request.checkpoint)
    tokens, kept = coder.encode([request.prompt + "\n"])
    length = int(kept.sum())
    model = _model(config, header, request, length)
    if model.vocab_size < coder.vocab_size:
        raise ValueError(
            f"{request.checkpoint} has {model.vocab_size} tokens, the tokenizer "
            f"{coder.vocab_size}: it is another model's"
        )
    model = dataclasses.replace(model, vocab_size=coder.vocab_size)
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
    params = policies.read_params(_language(header, coder.vocab_size), request.dtype)
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


def _model(config, header: Mapping[str, Any], request: Request, length: int) -> pi0.Pi0Config:
    """The model of the checkpoint, or of the config where one is given, with one camera."""
    cameras = ("image",) if request.image else ()
    given = {"image_keys": cameras, "max_token_len": length, "dtype": request.dtype}
    if request.image and "img" not in header["PaliGemma"]:
        raise ValueError(f"{request.checkpoint} has no vision tower: leave --image out")
    if config.model:
        return dataclasses.replace(policies.model_config(config, why="text"), **given)
    return recognize.model(header, **given)


def _language(header: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Without action expert and projections, and with the tokens that the tokenizer knows: the
    vocabulary of a PaliGemma from Hugging Face has 64 rows more, which nothing is trained to say.
    """
    flat = trees.flatten(header)
    kept = [p for p in flat if not any(re.fullmatch(r, p) for r in keymaps.NOT_PALIGEMMA)]
    found = {path: flat[path] for path in kept}
    found[_EMBEDDER] = leaves.Rows(flat[_EMBEDDER], vocab_size)
    return trees.unflatten(found)


def _tokenizer(name: str, checkpoint: str) -> tokenizer.SentencePieceTokenizer:
    """The one named in the config, else the tokenizer.model beside the checkpoint, as Hugging Face
    publishes it, else PaliGemma's from the cache or the hub.
    """
    if name.endswith(".model"):
        return tokenizer.SentencePieceTokenizer(name, _LONGEST)
    beside = layout.find(checkpoint).directory / "tokenizer.model"
    if beside.is_file():
        return tokenizer.SentencePieceTokenizer(beside, _LONGEST)
    return tokenizer.paligemma(_LONGEST)
