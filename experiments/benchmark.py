"""Measures ours against the straightforward program, interleaved: `make bench`.

  python experiments/benchmark.py --rows=sampling

Rows: `average` of three Orbax checkpoints of 268 MB, without writing; `gradient` of the loss in
three coefficients; `sampling` of two action chunks in ten flow steps. The latter two on
config.model.
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__, "pi0_libero.py:debug")
_ROWS = flags.DEFINE_list("rows", [], "Which rows to measure; default: all.")


def main() -> None:
    from policymix.runs import benchmark, policies

    config = policies.model_config(_CONFIG.value, why="a benchmark")
    if flags.FLAGS.dry_run:
        print("\n".join(benchmark.ROWS))
    else:
        print(benchmark.run(config, _ROWS.value))


if __name__ == "__main__":
    app.run(main)
