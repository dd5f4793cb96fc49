r"""Writes a checkpoint in another format, bit for bit: Orbax, or safetensors as OpenPI and LeRobot
name them.

  python experiments/convert.py --config=configs/pi05_libero.py --checkpoint=runs/mine/29999 \
    --format=openpi --output=exported
  python experiments/convert.py --config=configs/pi05_droid_finetune.py --checkpoint=mixed \
    --format=lerobot --output=pretrained_model
  python experiments/convert.py --checkpoint=lora/29999 --merge_lora --format=orbax --output=plain

Orbax gives OUTPUT/0, a step directory for OpenPI; the others OUTPUT/model.safetensors, and beside
it config.json, statistics and, for LeRobot, its processors. Whether it is a π0 or a π0.5 is read
from the arrays, and must be what --config says, where one is given.
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Of any format; gs:// and hf:// too; PaliGemma's .npz and open-pi-zero's .pt.",
    required=True,
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
_FORMAT = flags.DEFINE_string("format", "", "orbax, openpi, lerobot or lerobot_first.")
_MERGE_LORA = flags.DEFINE_bool(
    "merge_lora", False, "Add low-rank updates to their weights: a plain checkpoint."
)
_DTYPE = flags.DEFINE_string(
    "dtype", "", "Of the output: float32, bfloat16 or float16; default as stored."
)


def main() -> None:
    from policymix.runs import convert

    convert.convert(
        _CONFIG.value,
        convert.Request(
            checkpoint=_CHECKPOINT.value,
            output=pathlib.Path(_OUTPUT.value),
            format=_FORMAT.value,
            merge_lora=_MERGE_LORA.value,
            dtype=_DTYPE.value,
            overwrite=flags.FLAGS.overwrite,
            dry_run=flags.FLAGS.dry_run,
        ),
    )


if __name__ == "__main__":
    app.run(main)
