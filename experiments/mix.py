r"""Mixes checkpoints into one.

  python experiments/mix.py --checkpoints=a,b,c --output=mixed
  python experiments/mix.py --checkpoints=tuned --base=base --merge_ratio=0.25,0.5 --output=retain
  python experiments/mix.py --config=configs/pi05_libero.py --method=gradient_descent \
    --checkpoints=a,b,c --validation=val.npz --output=mixed
  python experiments/mix.py --checkpoints=a,b --output=mixed --format=lerobot \
    --config.mix.groups="('vision','action_expert','rest=.*')" \
    --coefficients="vision:1,0;action_expert:.5,.5;rest:.8,.2"
  python experiments/mix.py --from=mixed/mix.json --output=again
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_CHECKPOINTS = flags.DEFINE_list(
    "checkpoints", [], "Checkpoints of any format, or patterns such as run/*; gs:// and hf:// too."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
_METHOD = flags.DEFINE_string(
    "method",
    "",
    "average, manual, interpolate, inverse_loss, greedy, gradient_descent, "
    "adaptive_gradient_descent, gauss_newton or bfgs; default config.mix.method.",
)
_COEFFICIENTS = flags.DEFINE_string(
    "coefficients",
    "",
    "For manual: one number per checkpoint, normalised to sum 1; or NAME:1,2,3;NAME:4,5,6 for the "
    "groups of config.mix.groups.",
)
_BASE = flags.DEFINE_string(
    "base", "", "For interpolate: the pretrained checkpoint; default config.train.init_from."
)
_MERGE_RATIO = flags.DEFINE_string(
    "merge_ratio",
    "",
    "For interpolate: weight of the base, 0.5 by default; several, as 0.25,0.5; or NAME:0.3;NAME:1 "
    "for groups.",
)
_VALIDATION = flags.DEFINE_string(
    "validation", "", "Validation batches (.npz) to select and report losses on."
)
_FORMAT = flags.DEFINE_string(
    "format", "", "Of the output: orbax, openpi, lerobot or lerobot_first; default the inputs'."
)
_FROM = flags.DEFINE_string("from", "", "A mix.json: makes that mix again.")
_LANDSCAPE = flags.DEFINE_bool(
    "landscape", False, "Plots the loss over all mixes of two or three checkpoints."
)


def main() -> None:
    from policymix.runs import mix, requests

    mix.mix(
        _CONFIG.value,
        requests.Request(
            checkpoints=tuple(_CHECKPOINTS.value),
            output=pathlib.Path(_OUTPUT.value),
            method=_METHOD.value,
            coefficients=requests.parse_numbers("coefficients", _COEFFICIENTS.value),
            base=_BASE.value,
            merge_ratios=requests.parse_numbers("merge_ratio", _MERGE_RATIO.value),
            validation=_VALIDATION.value,
            format=_FORMAT.value,
            repeat=_FROM.value,
            landscape=_LANDSCAPE.value,
            overwrite=flags.FLAGS.overwrite,
            dry_run=flags.FLAGS.dry_run,
        ),
    )


if __name__ == "__main__":
    app.run(main)
