"""What OpenPI's own code makes of the tests' inputs: tests/testdata/openpi/transforms.npz.

Renew, with a checkout of OpenPI (its commit is COMMIT) and environments of its own:
  pip install numpy==1.26.4 pillow==11.2.1 numpydantic einops  # as OpenPI pins them
  PYTHONPATH=. python tests/transforms/openpi_golden.py CHECKOUT numbers
  pip install jax==0.10.2 augmax==0.4.1  # as OpenPI pins augmax
  PYTHONPATH=. python tests/transforms/openpi_golden.py CHECKOUT pictures
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np

COMMIT = "15a9616a00943ada6c20a0f158e3adb39df2ccac"
PATH = pathlib.Path(__file__).parents[1] / "testdata/openpi/transforms.npz"
KEY = 2  # of the augmentation: some of its three examples change colour, some do not
SIZES = ((5, 7, 6, 6), (40, 30, 28, 28), (23, 61, 16, 48), (30, 40, 30, 41))  # from, to
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")


def streams() -> dict[str, list[np.ndarray]]:
    """Batches that widen, repeat, stand still, and stay within the first one's extremes."""
    r = [np.random.Generator(np.random.PCG64(seed)) for seed in range(4)]
    growing = [r[0].random((32, 5)) * (i + 1) - i * 0.3 for i in range(12)]
    still = [r[2].random((16, 3)).astype(np.float32) * (1 + i) for i in range(6)]
    for batch in still:
        batch[:, 1:] = 1234.5, 0
    first = np.concatenate([np.full((1, 2), -5.0), np.full((1, 2), 9.0), r[3].random((30, 2))])
    return {
        "growing": growing,
        "growing in float32": [batch.astype(np.float32) for batch in growing],
        "chunks": [np.round(r[1].random((8, 6, 3)) * 20).astype(np.float32) - 7 for _ in range(9)],
        "still": still,
        "within": [first] + [r[3].random((40, 2)) * 3 for _ in range(5)],
    }


def joints() -> dict[str, np.ndarray]:
    r = np.random.Generator(np.random.PCG64(9))
    return {"state": r.random(14), "actions": r.random((3, 14))}


def picture(hh: int, ww: int) -> np.ndarray:
    """Uint8 [hh, ww, 3]."""
    r = np.random.Generator(np.random.PCG64(hh * 1000 + ww))
    return (r.random((hh, ww, 3)) * 256).astype(np.uint8)


def pictures() -> dict[str, np.ndarray]:
    """Uint8 [3, 20, 28, 3] for each camera."""
    return {c: np.stack([picture(20, 28)[:, :, [i, 1, 2]] for i in range(3)]) for c in CAMERAS}


def _load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(checkout: pathlib.Path) -> dict[str, np.ndarray]:
    """Of RunningStats, image_tools and aloha_policy."""
    made = {}
    normalize = _load(checkout / "src/openpi/shared/normalize.py")
    for name, batches in streams().items():
        stats = normalize.RunningStats()
        for batch in batches:
            stats.update(batch.copy())
        found = stats.get_statistics()
        made |= {f"{name}/{f}": getattr(found, f) for f in ("mean", "std", "q01", "q99")}
    tools = _load(checkout / "packages/openpi-client/src/openpi_client/image_tools.py")
    for hh, ww, height, width in SIZES:
        resized = tools.resize_with_pad(picture(hh, ww), height, width)
        made[f"resized/{hh}x{ww}"] = resized
    # The policy's file imports what needs all of OpenPI; its conversions do not.
    sys.modules["openpi"] = types.ModuleType("openpi")
    sys.modules["openpi"].transforms = types.SimpleNamespace(DataTransformFn=object)
    aloha = _load(checkout / "src/openpi/policies/aloha_policy.py")
    given = joints()
    state, actions = given["state"], given["actions"]
    made["aloha/state"] = aloha._decode_state(state.copy(), adapt_to_pi=True)
    made["aloha/actions"] = aloha._encode_actions_inv(actions.copy(), adapt_to_pi=True)
    made["aloha/commands"] = aloha._encode_actions(actions.copy(), adapt_to_pi=True)
    return made


def augmented(checkout: pathlib.Path) -> dict[str, np.ndarray]:
    """augmax, asked as src/openpi/models/model.py asks it."""
    import augmax
    import jax

    made = {}
    for camera, given in pictures().items():
        unit = (given.astype(np.float32) / 255 * 2 - 1) / 2 + 0.5
        steps = [augmax.ColorJitter(brightness=0.3, contrast=0.4, saturation=0.5)]
        if "wrist" not in camera:
            hh, ww = unit.shape[1:3]
            crop = augmax.RandomCrop(int(ww * 0.95), int(hh * 0.95))
            steps = [crop, augmax.Resize(ww, hh), augmax.Rotate((-5, 5)), *steps]
        keys = jax.random.split(jax.random.key(KEY), len(unit))
        made[f"augmented/{camera}"] = jax.vmap(augmax.Chain(*steps))(keys, unit) * 2 - 1
    return made


if __name__ == "__main__":
    part = {"numbers": numbers, "pictures": augmented}[sys.argv[2]]
    kept = dict(np.load(PATH)) if PATH.exists() else {}
    np.savez_compressed(PATH, **(kept | part(pathlib.Path(sys.argv[1]))))
