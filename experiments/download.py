r"""Downloads checkpoints, tokenizers and datasets into folders of one's own, each whole or absent.

  python experiments/download.py --name=pi05_libero
  python experiments/download.py --name=all --output=checkpoints/pi0
  python experiments/download.py --name=hf://lerobot/pi05_base,paligemma_tokenizer
  python experiments/download.py --name=hf://datasets/lerobot/pusht,fractal --output=datasets

Names: pi0_base, pi0_libero, pi05_base, pi05_libero, pi05_droid, all (those five), paligemma,
paligemma_tokenizer, fractal, bridge (which prints how), and any gs://BUCKET/PATH or
hf://[datasets/]ORG/REPO[@REVISION][/PATH]. Bytes are verified, and pass through $POLICYMIX_CACHE
(~/.cache/policymix), to which the folders are linked: on one disk they take no room twice.
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_NAME = flags.DEFINE_list("name", None, "One of the above, or several: a,b.", required=True)
_OUTPUT = flags.DEFINE_string("output", "checkpoints/pi0", "Where the folders are to be.")


def main() -> None:
    from policymix.runs import download

    download.run(
        [name.strip() for name in _NAME.value if name.strip()],
        _OUTPUT.value,
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
