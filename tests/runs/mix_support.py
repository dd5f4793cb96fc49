"""What the tests of mixing share: configs, validation batches, checkpoints that differ."""

import pathlib

from configs import pi0_libero, pi05_libero
from tests import oracle

ROOT = pathlib.Path(__file__).parents[2]


CONFIGS = {"pi0": pi0_libero, "pi05": pi05_libero}


def debug_config(model="pi0", **settings):
    config = CONFIGS[model].get_config("debug")
    config.mix.update(settings)
    return config


VALIDATION = str(oracle.OPENPI / "pi0" / "val_batches.npz")


def different_stats(tmp_path):
    return tuple(
        str(oracle.write("pi0", which, tmp_path / "different")) for which in oracle.VARIANTS
    )
