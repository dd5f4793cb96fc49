"""Installs policymix. `pip install -e .[dev]` for development; the Makefile does it for you."""

import pathlib

import setuptools

_ROOT = pathlib.Path(__file__).parent

setuptools.setup(
    name="policymix",
    version="0.1.0",
    description="Many fine-tuned vision-language-action checkpoints in, one better policy out.",
    long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["policymix", "policymix.*"]),
    install_requires=[
        "jax>=0.10.0",
        "flax>=0.12.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.0",
        "tensorstore>=0.1.80",
        "ml-collections>=1.1.0",
        "absl-py>=2.3",
        "numpy>=2.0",
        "chex>=0.1.90",
        "jaxtyping>=0.3.2",
        "beartype>=0.22",
        "einops>=0.8",
        "pyarrow>=19",
        "grain>=0.2.12",
        "av>=18",  # its wheels have dav1d, SVT-AV1 and x264
        "simplejpeg>=1.7",
        "h5py>=3.11",
        "google-crc32c>=1.5",
        "matplotlib>=3.9",
        "pillow>=10",
        "tensorboardX>=2.6.4",
        "tqdm>=4.66",
        "sentencepiece>=0.2",
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "sim": [  # one set of versions that were tested together
            "gymnasium==1.4.0",
            "metaworld==3.1.1",
            "mujoco==3.3.0",
            "packaging",
            "gym-pusht==0.1.8",
            "pymunk==6.11.1",
            "gym-aloha==0.1.5",
            "dm-control==1.0.28",  # gym-aloha's; the one of this mujoco
        ],
        "rlds": [  # to build datasets, and to compare with
            "tensorflow-cpu>=2.20",
            "tensorflow-datasets>=4.9.9",
            "importlib_resources",  # which it forgets
        ],
        "hub": ["requests>=2.32", "google-auth>=2", "huggingface_hub>=1,<3"],
        "wandb": ["wandb>=0.18"],
        "torch": ["torch>=2.4"],  # open-pi-zero's .pt
        "notebooks": ["jupyterlab", "nbconvert", "ipykernel"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "safetensors>=0.5",  # the reference implementation, in tests alone
            "jsonschema>=4.20",
            "nbconvert>=7.10",  # runs the notebooks
            "ipykernel>=6.29",
            "ruff>=0.12",
            "pre-commit>=4",
        ],
    },
)
