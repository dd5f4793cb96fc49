r"""Random pictures, prompt and proprio in, a chunk of actions out: any policy, with its latency.

  python experiments/sample_actions.py --config=configs/pi05_libero.py:debug
  python experiments/sample_actions.py --config=configs/pi05_libero.py
  python experiments/sample_actions.py --config=configs/pi0_libero.py --num_samples=8 \
    --config.model.paligemma_variant=gemma_2b_lora
  python experiments/sample_actions.py --checkpoint=runs/mine/29999

Parameters are random without --checkpoint. The second command is of full size: 6.7 GB of bfloat16;
a CPU widens them, and takes 25 GB with one camera.
Without --config the sizes are read from the checkpoint's arrays, and OpenPI's defaults stand for
what no array tells: three cameras, the horizon, the prompt's length.
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Of any format; default: random parameters.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Observations in a call.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Action chunks for each observation.")
_NUM_CALLS = flags.DEFINE_integer("num_calls", 10, "Calls that are timed, after the first.")
_SEED = flags.DEFINE_integer("seed", 0, "Of inputs, noise and random parameters.")


def main() -> None:
    from policymix.runs import sample_actions

    sample_actions.sample(
        _CONFIG.value,
        sample_actions.Request(
            checkpoint=_CHECKPOINT.value,
            batch_size=_BATCH_SIZE.value,
            num_samples=_NUM_SAMPLES.value,
            num_calls=_NUM_CALLS.value,
            seed=_SEED.value,
            dry_run=flags.FLAGS.dry_run,
        ),
    )


if __name__ == "__main__":
    app.run(main)
