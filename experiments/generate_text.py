r"""Text from a picture and a prompt: PaliGemma alone, or the PaliGemma within a π0.

  python experiments/generate_text.py --checkpoint=hf://google/paligemma-3b-pt-224 \
    --image=photo.jpg --prompt="caption en"

The checkpoint may be big_vision's .npz, Hugging Face's safetensors, or any π0's; its sizes are read
from its arrays. The tokenizer is config.data.tokenizer if that is a .model file, else the
tokenizer.model beside the checkpoint, else PaliGemma's: from the cache, from gs://big_vision, or
from the hub after a login.
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Of any format; gs:// and hf:// too.", required=True
)
_IMAGE = flags.DEFINE_string("image", "", "A picture file; without one there is text alone.")
_PROMPT = flags.DEFINE_string("prompt", "caption en", "What PaliGemma is asked.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "The longest answer.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token each time.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn at a temperature above 0.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of all arithmetic.")


def main() -> None:
    from policymix.runs import generate_text

    generate_text.generate(
        _CONFIG.value,
        generate_text.Request(
            checkpoint=_CHECKPOINT.value,
            image=_IMAGE.value,
            prompt=_PROMPT.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            temperature=_TEMPERATURE.value,
            seed=_SEED.value,
            dtype=_DTYPE.value,
            dry_run=flags.FLAGS.dry_run,
        ),
    )


if __name__ == "__main__":
    app.run(main)
