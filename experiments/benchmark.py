"""Measures ours against the straightforward program, interleaved: `make bench`.

python experiments/benchmark.py --rows="sampling, 10 steps, 0.5 M parameters"
"""

from absl import flags

from policymix import app

_ROWS = flags.DEFINE_multi_string("rows", [], "A row to measure; may be given again. Default: all.")


def main() -> None:
    from policymix.runs import benchmark

    if flags.FLAGS.dry_run:
        print("\n".join(benchmark.ROWS))
    else:
        print(benchmark.run(_ROWS.value))


if __name__ == "__main__":
    app.run(main)
