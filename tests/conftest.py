"""Every test runs on CPU, on eight pretended devices, with JAX at its strictest.

Small networks spend their time in the compiler, so it is told not to try hard;
JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the tests on the code that users run.
"""

import importlib.util
import mmap
import os
import pathlib

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def _quick_to_compile():
    """Flags that halve the compiler's work once more, those of them that this jaxlib has: XLA ends
    the process at a flag that it does not know.
    """
    flags = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    library = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent / "libjax_common.so"
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "1" or not library.exists():
        return []
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        # A flag's name is a text of its own there; elsewhere too, once it is gone.
        return [f for f in flags if code.find(b"\0%s\0" % f[2:].partition("=")[0].encode()) >= 0]


os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *_quick_to_compile(),
    ]
)
# Compiled programs are shared between tests, workers, the mains they start, and runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402 - after the environment, which it reads at import

# A pytest plugin may have imported jax before this file set the environment.
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
