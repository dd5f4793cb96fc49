"""Measures ours against the straightforward program, interleaved: `make bench`.

  python experiments/benchmark.py --rows=sampling

Rows: `float32`, `bfloat16` and `orbax`, mixes of three checkpoints of 257 M parameters from disk to
disk, and `twenty`, of twenty smaller ones (8 GB of room in TMPDIR); `gradient` of the loss in three
coefficients and `sampling` of two action chunks in ten flow steps, both on config.model;
`training`, 50 steps at batch 64, and `rollouts`, 100 episodes of 64 steps, both of the policy that
the quickstart trains. On a π0.5 of 108 M parameters in float32: `cameras`, sampling for a robot
with one camera of three, the others dropped against masked; `all_cameras`, sampling with all three
against OpenPI's way; `samples`, eight of one observation in one call against eight. On one of 37 M:
a `step` of training at batch 1 against one that runs all of the last layer, with the peak memory of
both. Of training as a whole: `loop_of_training`, the loop against its compiled step alone;
`feeding`, pictures decoded on the way against decoded ones; `saving`, steps that write a checkpoint
against others; `adam_8bit`, moments in 8 bits against float32; `memory`, four ways to train a π0 of
159 M parameters, their peaks beside what --dry_run foresees, in processes of their own. The others
read data and learn from rewards: `--dry_run` lists all.
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__, "pi0_libero.py:debug")
_ROWS = flags.DEFINE_list("rows", [], "Which rows to measure; default: all.")


def main() -> None:
    from configs import pi0_metaworld
    from policymix.runs import benchmark, policies

    config = policies.model_config(_CONFIG.value, why="a benchmark")
    if flags.FLAGS.dry_run:
        print("\n".join(benchmark.ROWS))
    else:
        print(benchmark.run(config, pi0_metaworld.get_config(), _ROWS.value))


if __name__ == "__main__":
    app.run(main)
