"""What we write is read by the jax and Orbax that OpenPI pins, in an environment of their own."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import common
from policymix.checkpoints import store
from policymix.runs import mix
from tests import oracle

PINS = ("jax==0.5.3", "orbax-checkpoint==0.11.13", "numpy==1.26.4")
READER = """
import json, sys
import jax, numpy as np, orbax.checkpoint as ocp

sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
told = {}
for kind in (np.ndarray, jax.Array):
    args = ocp.ArrayRestoreArgs(restore_type=kind, sharding=sharding if kind is jax.Array else None)
    with ocp.PyTreeCheckpointer() as checkpointer:
        item = {"params": checkpointer.metadata(sys.argv[1])["params"]}
        restored = checkpointer.restore(
            sys.argv[1],
            ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(lambda _: args, item)),
        )
    leaves = jax.tree_util.tree_flatten_with_path(restored["params"])[0]
    assert all(isinstance(leaf, kind) for _, leaf in leaves)
    told[kind.__name__] = {
        "/".join(key.key for key in path): float(np.asarray(leaf, np.float64).sum())
        for path, leaf in leaves
    }
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 has no wheel for this Python")
def test_openpis_orbax_restores_a_mix(tmp_path):
    paths = [str(oracle.write("pi0", w, tmp_path, norm_stats_of="base")) for w in ("var1", "var2")]
    mix.mix(common.get_config(), mix.Request(checkpoints=tuple(paths), output=tmp_path / "mixed"))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
    read = [python, "-c", READER, tmp_path / "mixed" / "0" / "params"]
    result = subprocess.run(read, check=True, capture_output=True, text=True)
    ours = {
        "/".join([key.key for key in path] + ["value"]): float(np.asarray(leaf, np.float64).sum())
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            store.load_params(tmp_path / "mixed")
        )[0]
    }
    assert json.loads(result.stdout.splitlines()[-1]) == {"ndarray": ours, "Array": ours}
