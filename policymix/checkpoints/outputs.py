"""What a mix is written as: the format of its inputs or another, with the files beside it."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from policymix.checkpoints import (
    assets,
    conversions,
    items,
    keymaps,
    layout,
    leaves,
    processors,
    safetensors,
)
from policymix.checkpoints.leaves import Leaf
from policymix.checkpoints.store import FORMATS, Checkpoint
from policymix.transforms.normalize import Stats

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]

_BESIDE = 64 * 2**20  # bytes: larger files are not what describes a model
_OURS = ("mix.json", "mix.png", "convert.json", assets.NORM_STATS, layout.INDEX)


@dataclasses.dataclass(frozen=True)
class Output:
    """How a mix is written.

    Attributes:
      format: "orbax", a naming of π0's tensors, or "safetensors" for tensors by their own names.
      like: the checkpoint whose files and layout it follows; None where no input has the format.
      by_tree: whether what is mixed are leaves of our tree, else tensors by the output's names.
    """

    format: str
    like: Checkpoint | None
    by_tree: bool

    def select(self, checkpoint: Checkpoint, siglip_heads: int | None = None) -> dict[str, Leaf]:
        """A checkpoint's leaves as they are to be mixed."""
        if self.by_tree:
            return checkpoint.tree(siglip_heads)
        if checkpoint.format == self.format:
            return dict(checkpoint.leaves)
        wanted = list(self.like.leaves)
        return conversions.renamed(checkpoint.leaves, checkpoint.format, self.format, wanted)

    def check_stats(self, stats: Stats) -> None:
        """ValueError where a normalisation does not fit the files that the mix is written like."""
        if self.like is not None:
            processors.check(self.like.place.directory, self.like.buffers, stats)

    def params(self, directory: pathlib.Path) -> pathlib.Path:
        """Where the parameters come to lie."""
        return directory / "0" / "params" if self.format == "orbax" else directory

    def sink(self, directory: pathlib.Path, shapes: Shapes) -> leaves.Sink:
        """Opens the files of a mix with these leaves in a directory that is still being made."""
        if self.format == "orbax":
            return items.ItemWriter(self.params(directory), shapes)
        tensors = dict(shapes)
        made: dict[str, keymaps.Made] = {}
        if self.by_tree:
            made = keymaps.tensors({path: shape for path, (shape, _) in shapes.items()})
            tensors = {
                keymaps.rename(piece.name, "openpi", self.format): (piece.tensor, shapes[path][1])
                for path, one in made.items()
                for piece in one.pieces
            }
        names = self._add_missing(tensors, shapes)
        writer = safetensors.TensorWriter(directory, tensors, self._files(tensors))
        return conversions.PiecedSink(writer, made, names) if self.by_tree else writer

    def _add_missing(self, tensors: dict, shapes: Shapes) -> dict[str, Sequence[str]]:
        """Adds what the format has beside what is mixed; returns the names each tensor goes to."""
        if self.like is not None:
            for name, leaf in (self.like.leaves | self.like.buffers).items():
                tensors.setdefault(name, (leaf.shape, leaf.dtype))
        elif self.by_tree:
            extra = keymaps.extra_tensors({path: shape for path, (shape, _) in shapes.items()})
            dtype = shapes["action_in_proj/bias"][1]
            for name, (_, shape) in extra.items():
                tensors[keymaps.rename(name, "openpi", self.format)] = shape, dtype
        if not self.by_tree:
            return {}
        opened = {keymaps.rename(name, self.format, "openpi"): [name] for name in tensors}
        for embedding, head in keymaps.TIED.items():
            both = [n for n in opened.get(embedding, []) + opened.get(head, []) if n in tensors]
            for name in both:
                tensors[name] = tensors[both[0]]
            opened[embedding] = opened[head] = both
            if self.like is not None:  # the files of some hold only one of the two
                opened[embedding] = opened[head] = [n for n in both if n in self.like.leaves]
                for name in set(both) - set(opened[embedding]):
                    del tensors[name]
        return opened

    def _files(self, tensors: Mapping[str, object]) -> safetensors.Layout:
        if self.like is not None:
            return self.like.files
        return safetensors.Layout(
            ((layout.TENSORS, tuple(tensors)),), {"format": "pt"}, index=False
        )

    def finish(
        self,
        directory: pathlib.Path,
        sink: leaves.Sink,
        mixed: Sequence[str],
        stats: tuple[str, Stats] | None,
    ) -> None:
        """Writes what is not mixed: statistics, and the small files beside the parameters.

        Args:
          mixed: the paths that were mixed.
          stats: (asset id, the mix's normalisation), or None.
        """
        if self.format != "orbax":
            self._write_rest(sink, mixed, None if stats is None else stats[1])
            sink.finish()
            if self.like is not None:
                _copy_beside(self.like.place.directory, directory)
        else:
            sink.finish_step(directory / "0")
        if stats is None:
            return
        asset_id, content = stats
        if self.format != "orbax":
            processors.write(directory, content)
        folder = self.assets(directory)
        assets.write_norm_stats(folder / asset_id / assets.NORM_STATS, content)
        assets.write_norm_stats(directory / assets.NORM_STATS, content)

    def assets(self, directory: pathlib.Path) -> pathlib.Path:
        """The folder with the assets of the mix."""
        return directory / "0" / "assets" if self.format == "orbax" else directory / "assets"

    def _write_rest(self, sink, mixed: Sequence[str], stats: Stats | None) -> None:
        """Copies tensors that no leaf of ours holds, and puts the statistics into buffers."""
        if self.like is None:
            return
        writer = sink.inner if isinstance(sink, conversions.PiecedSink) else sink
        for name, array in processors.buffers(self.like.buffers, stats).items():
            writer.write(name, 0, array.reshape(-1))
        if self.by_tree:
            made = conversions.tree_of(self.like.leaves, self.format, self.like.name)
            used = {piece.name for leaf in made.values() for piece in leaf.pieces}
            used |= {n for pair in keymaps.TIED.items() for n in pair if used & set(pair)}
            done = {keymaps.rename(name, "openpi", self.format) for name in used}
        else:
            done = set(mixed)
        for name in self.like.leaves.keys() - done:
            writer.write(name, 0, self.like.leaves[name].read().reshape(-1))


def choose(checkpoints: Sequence[Checkpoint], first: int, wanted: str = "") -> Output:
    """The format of a mix.

    Args:
      checkpoints: all inputs; `first` is the one whose format the mix takes, unless `wanted`.

    Raises:
      ValueError: an unknown format, or one that the inputs cannot be written in.
    """
    if wanted not in ("", "safetensors", *FORMATS):
        raise ValueError(f"--format {wanted!r}: expected one of {', '.join(FORMATS)}")
    formats = [checkpoint.format for checkpoint in checkpoints]
    if wanted == "safetensors":  # of whatever naming the inputs have
        torch = [f for f in formats if f != "orbax"]
        wanted = torch[0] if torch else "openpi"
    # What has no files of its kind to be like, such as a .pt, becomes Orbax.
    chosen = wanted or (formats[first] if checkpoints[first].files is not None else "orbax")
    unknown = [c.name for c in checkpoints if c.format == "safetensors"]
    if unknown and set(formats) | {chosen} != {"safetensors"}:
        raise ValueError(
            f"{unknown[0]} has tensors of another architecture than π0's; it can be mixed only "
            "with safetensors of the same names, into safetensors"
        )
    same = [first, *range(len(checkpoints))]
    alike = [checkpoints[k] for k in same if formats[k] == chosen]
    like = next((checkpoint for checkpoint in alike if checkpoint.files is not None), None)
    by_tree = chosen == "orbax" or "orbax" in formats or like is None
    return Output(chosen, like, by_tree)


def _copy_beside(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies the small files that describe a model, such as config.json; nothing is overwritten."""
    for path in sorted(source.iterdir()):
        target = directory / path.name
        model = path.name.endswith(
            (".bin", ".pt", ".pth", ".safetensors", ".safetensors.index.json")
        )
        processor = path.name.startswith(("policy_preprocessor", "policy_postprocessor"))
        if target.exists() or path.name in _OURS or path.name.startswith("."):
            continue
        if path.is_file() and path.stat().st_size <= _BESIDE and (processor or not model):
            shutil.copyfile(path, target)
