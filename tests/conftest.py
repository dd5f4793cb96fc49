"""Every test runs on CPU, on eight pretended devices, with JAX at its strictest.

Small networks spend their time in the compiler, so it is told not to try hard;
JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the tests on the code that users run.
"""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402  (the environment is read at import)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
