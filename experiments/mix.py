r"""Mixes checkpoints into one.

  python experiments/mix.py --checkpoints=a,b,c --output=mixed
  python experiments/mix.py --checkpoints=a,b,c --output=mixed --coefficients=0.5,0.3,0.2
  python experiments/mix.py --checkpoints=tuned --base=base --merge_ratio=0.25,0.5 --output=retain
  python experiments/mix.py --config=configs/pi05_libero.py --method=gradient_descent \
    --checkpoints=a,b,c --validation=val.npz --output=mixed
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_CHECKPOINTS = flags.DEFINE_list(
    "checkpoints", [], "Step directories, params directories or outputs of a mix."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
_METHOD = flags.DEFINE_string(
    "method",
    "",
    "average, manual, interpolate, inverse_loss, greedy, gradient_descent or "
    "adaptive_gradient_descent; default config.mix.method.",
)
_COEFFICIENTS = flags.DEFINE_list(
    "coefficients", [], "For manual: one number per checkpoint, normalised to sum 1."
)
_BASE = flags.DEFINE_string(
    "base", "", "For interpolate: the pretrained checkpoint; default config.train.init_from."
)
_MERGE_RATIO = flags.DEFINE_list(
    "merge_ratio", [], "For interpolate: weight of the base, 0.5 by default; or several."
)
_VALIDATION = flags.DEFINE_string(
    "validation", "", "Validation batches (.npz) to select and report losses on."
)


def main() -> None:
    from policymix.runs import mix

    mix.mix(
        _CONFIG.value,
        mix.Request(
            checkpoints=tuple(_CHECKPOINTS.value),
            output=pathlib.Path(_OUTPUT.value),
            method=_METHOD.value,
            coefficients=app.numbers("coefficients", _COEFFICIENTS.value),
            base=_BASE.value,
            merge_ratios=app.numbers("merge_ratio", _MERGE_RATIO.value),
            validation=_VALIDATION.value,
            overwrite=flags.FLAGS.overwrite,
            dry_run=flags.FLAGS.dry_run,
        ),
    )


if __name__ == "__main__":
    app.run(main)
