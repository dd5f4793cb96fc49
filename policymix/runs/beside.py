"""The small files that other programs expect beside PyTorch tensors."""

import pathlib
import tempfile
from collections.abc import Set
from typing import NamedTuple

import ml_collections

from policymix.checkpoints import outputs, pretrained
from policymix.models import pi0
from policymix.runs import encoding
from policymix.transforms.normalize import Stats


class Beside(NamedTuple):
    """The small files beside PyTorch tensors, where no input has them to copy.

    Attributes:
      model: what they tell; None where there is no config. data: its section of that name.
      stats: the normalisation, if there is one. dtypes: of all arrays.
    """

    output: outputs.Output
    model: pi0.Pi0Config | None
    data: ml_collections.ConfigDict
    stats: Stats | None
    dtypes: Set[str]

    def check(self) -> None:
        """ValueError where they cannot be written, before anything is."""
        if self.stats is not None:
            self.output.check_stats(self.stats)
        with tempfile.TemporaryDirectory() as folder:
            self.write(pathlib.Path(folder))

    def note(self) -> str:
        """What is missing, in words; "" where nothing is."""
        if self._writes("lerobot_first"):
            return "no input has LeRobot's config.json of that time: put one beside the output"
        if self.model is None and (self._writes("lerobot") or self._writes("openpi")):
            return (
                "no config.json is written, since no array tells the action horizon: pass "
                "--config=configs/NAME.py"
            )
        return ""

    def write(self, directory: pathlib.Path) -> None:
        """Into a directory that is still being made."""
        if self.model is None:
            return
        model = self.model.without_lora()
        dtype = "bfloat16" if self.dtypes == {"bfloat16"} else "float32"
        if self._writes("openpi"):
            pretrained.write_openpi(directory, model, dtype)
        if self._writes("lerobot"):
            named = {c: self.data.cameras.get(c, "") for c in model.image_keys}
            there = {c: feature for c, feature in named.items() if feature != encoding.ABSENT}
            pretrained.write_lerobot(
                directory,
                model.seeing(there),
                self.stats,
                cameras=there,
                dtype=dtype,
                quantiles=self.data.quantiles,
            )

    def _writes(self, format_: str) -> bool:
        return self.output.like is None and self.output.format == format_
