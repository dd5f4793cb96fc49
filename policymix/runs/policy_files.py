"""The small files that other programs expect beside PyTorch tensors: config.json, processors."""

import pathlib
import tempfile
from collections.abc import Set
from typing import NamedTuple

import ml_collections

from policymix import files
from policymix.checkpoints import outputs, pretrained
from policymix.models import pi0, variants
from policymix.runs import encoding
from policymix.transforms.normalize import Stats

_NOTES = {
    "lerobot_first": "neither LeRobot's config.json of that time nor its statistics are written",
    "lerobot": "no config.json is written, since no array tells the action horizon: pass "
    "--config=configs/NAME.py",
}
_NOTES["openpi"] = _NOTES["lerobot"]
_BUILT = ("gemma_2b", "gemma_300m")  # what LeRobot can build


class PolicyFiles(NamedTuple):
    """What is written beside the tensors of an output.

    Attributes:
      model: what the files tell; None where there is no config. data: its section of that name.
      stats: the normalisation, if there is one. dtypes: of all arrays.
    """

    output: outputs.Output
    model: pi0.Pi0Config | None
    data: ml_collections.ConfigDict
    stats: Stats | None
    dtypes: Set[str]

    @property
    def needed(self) -> bool:
        """Whether the output's program wants a config.json that no input has to copy."""
        return self.output.format in _NOTES and not self._copied

    @property
    def _copied(self) -> bool:
        like = self.output.like
        return like is not None and (like.place.directory / pretrained.CONFIG).is_file()

    def check(self) -> None:
        """ValueError where they cannot be written, before anything is."""
        if self.stats is not None:
            self.output.check_stats(self.stats)
        with tempfile.TemporaryDirectory() as folder:
            self.write(pathlib.Path(folder))

    def note(self) -> str:
        """What the output lacks for its program, in words; "" where nothing."""
        if not self.needed:
            return ""
        if self.model is None or self.output.format == "lerobot_first":
            return _NOTES[self.output.format]
        plain = self.model.without_lora()
        sizes = (plain.paligemma_variant, plain.action_expert_variant)
        if self.output.format == "lerobot" and sizes != tuple(map(variants.size, _BUILT)):
            return f"LeRobot itself builds policies of {' and '.join(_BUILT)} alone"
        return ""

    def write(self, directory: pathlib.Path) -> None:
        """Into a directory that is still being made, after what is copied from an input."""
        self._correct(directory / pretrained.CONFIG)
        if not self.needed or self.model is None:
            return
        if self.output.format == "openpi":
            pretrained.write_openpi(directory, self.model.without_lora(), self._dtype)
        if self.output.format == "lerobot":
            there = encoding.present(self.model, self.data)
            pretrained.write_lerobot(
                directory,
                self.model.seeing(there).without_lora(),
                self.stats,
                cameras=there,
                dtype=self._dtype,
                quantiles=encoding.wiring(self.data).scheme != "mean_std",
            )

    @property
    def _dtype(self) -> str:
        """That of all arrays; float32 where they differ."""
        return next(iter(self.dtypes)) if len(self.dtypes) == 1 else "float32"

    def _correct(self, config: pathlib.Path) -> None:
        """A config.json that was copied says the dtype of its own tensors."""
        if len(self.dtypes) != 1 or not config.is_file():
            return
        content = files.read_json(config)
        for field in ("dtype", "precision"):
            if isinstance(content, dict) and content.get(field, self._dtype) != self._dtype:
                files.write_json(config, content | {field: self._dtype})
