"""The four floors: who may import whom, and what the pure floors may touch."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

import policymix

PACKAGE = pathlib.Path(policymix.__file__).parent

# Bottom up. Within a floor its root modules come first, in order; then its folders, side by side,
# each with its modules in order. What the design plans has its place here before it is written.
FLOORS = (
    {"": ("structs", "trees")},
    {
        "": ("intervals", "nf4", "sharding"),
        "models": (
            "siglip",
            "lora",
            "variants",
            "attention",
            "gemma",
            "flow",
            "config",
            "network",
            "recognize",
            "pi0",
            "rtc",
            "text",
        ),
        "mixing": ("rules", "simplex", "objective", "search"),
        "rl": (
            "config",
            "chunks",
            "layers",
            "networks",
            "losses",
            "state",
            "chunk_iql",
            "chunk_soft",
            "qc",
            "learner",
        ),
        "training": ("eight_bit", "optimizers", "state"),
        "transforms": (
            "compose",
            "selection",
            "normalize",
            "histograms",
            "images",
            "prompts",
            "robots",
        ),
    },
    {
        "": (
            "files",
            "memory",
            "processes",
            "distributed",
            "trackers",
            "metrics",
            "hub",
        ),
        "checkpoints": (
            "layout",
            "leaves",
            "zarr",
            "items",
            "npz",
            "open_pi_zero",
            "keymaps",
            "conversions",
            "safetensors",
            "processors",
            "assets",
            "pretrained",
            "store",
            "outputs",
            "series",
            "blocks",
            "jobs",
            "copies",
            "streaming",
            "provenance",
        ),
        "data": (
            "tables",
            "pictures",
            "videos",
            "frames",
            "places",
            "statistics",
            "columns",
            "lerobot",
            "video_files",
            "layouts",
            "writer",
            "hdf5",
            "hdf5_layouts",
            "recordings",
            "tfrecord",
            "examples",
            "features",
            "oxe",
            "shards",
            "tfds",
            "rlds_index",
            "rlds",
            "ogbench",
            "opening",
            "tokenizer",
            "loader",
            "validation",
        ),
        "sim": (
            "metaworld",
            "pusht",
            "aloha",
            "envs",
            "pushes",
            "bimanual",
            "experts",
            "worker",
            "workers",
        ),
        "serving": ("protocol", "server", "client"),
        "reports": (
            "tables",
            "rates",
            "pages",
            "mixes",
            "landscapes",
            "evaluations",
            "trainings",
            "verdicts",
            "pictures",
            "quickstart",
        ),
    },
    {
        "": ("app",),
        "runs": (
            "encoding",
            "policies",
            "policy_files",
            "inputs",
            "metadata",
            "sources",
            "statistics",
            "pipeline",
            "judge",
            "requests",
            "repeats",
            "searches",
            "advice",
            "landscapes",
            "mix",
            "convert",
            "generate_text",
            "sample_actions",
            "workdirs",
            "dump_validation",
            "norm_stats",
            "records",
            "rows",
            "episodes",
            "split_dataset",
            "label_rewards",
            "import_hdf5",
            "resize_rlds",
            "edit_dataset",
            "learners",
            "transitions",
            "proposals",
            "chunk_policies",
            "collect_demos",
            "rollouts",
            "held_out",
            "budget",
            "train_settings",
            "first_params",
            "training_loop",
            "train",
            "offline_rl",
            "replays",
            "evaluate",
            "download",
            "measurements",
            "mixing_rows",
            "model_rows",
            "soft_rows",
            "rl_rows",
            "optimizer_rows",
            "rlds_sides",
            "data_rows",
            "training_rows",
            "memory_rows",
            "benchmark",
            "lanes",
            "stages",
            "quickstart",
            "doctor",
        ),
    },
)
FOREIGN = ("absl", "orbax", "tensorflow", "torch", "ml_collections", "tensorstore")
IMPURE = (*FOREIGN, "time", "os", "pathlib")


def _places() -> dict[str, tuple[int, str, int]]:
    """Module → (floor, folder, place in the folder)."""
    return {
        ".".join(filter(None, ("policymix", folder, name))): (floor, folder, place)
        for floor, folders in enumerate(FLOORS)
        for folder, names in folders.items()
        for place, name in enumerate(names)
    }


@functools.cache
def _files() -> dict[str, pathlib.Path]:
    return {
        ".".join(("policymix", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Full names of all that a module imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(_files()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = node.module.split(".")[0] == "policymix"
            found |= {n if n in _files() else node.module for n in names} if inside else names
    return frozenset(found)


def _may_import(importer: str, imported: str) -> bool:
    (floor, folder, place), (its_floor, its_folder, its_place) = (
        _places()[importer],
        _places()[imported],
    )
    if its_floor != floor:
        return its_floor < floor
    if its_folder == folder:
        return its_place < place
    return its_folder == ""  # a floor's root modules carry its folders


def _on_floors(*floors: int) -> list[str]:
    places = _places()
    return [name for name in _files() if name in places and places[name][0] in floors]


def test_every_module_has_its_place():
    homeless = sorted(_files().keys() - _places().keys())
    assert not homeless, (
        f"{homeless} have no place in FLOORS of tests/layers_test.py: decide on which floor they "
        "stand and after which modules of their folder"
    )


@pytest.mark.parametrize("module", sorted(_files()))
def test_a_module_imports_only_from_below_or_before(module):
    inside = {name for name in _imports(module) if name.split(".")[0] == "policymix"}
    unknown = sorted(inside - _files().keys())
    assert not unknown, f"{module} imports {unknown}, which are no modules of the package"
    assert inside | {module} <= _places().keys(), "see test_every_module_has_its_place"
    wrong = sorted(name for name in inside if not _may_import(module, name))
    assert not wrong, f"{module} imports {wrong}: from its own floor or above, or from later on"


def test_the_law_of_floors_refuses_what_it_should():
    assert _may_import("policymix.checkpoints.store", "policymix.files")
    assert _may_import("policymix.mixing.search", "policymix.mixing.objective")
    assert not _may_import("policymix.mixing.rules", "policymix.mixing.search")  # later
    assert not _may_import("policymix.mixing.rules", "policymix.models.flow")  # beside
    assert not _may_import("policymix.files", "policymix.checkpoints.store")  # what it carries
    assert not _may_import("policymix.trees", "policymix.files")  # above


def test_imports_have_no_cycle():
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, f"cycle: {' → '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for imported in _imports(module) & _files().keys():
                visit(imported, [*path, module])
            done.add(module)

    for module in _files():
        visit(module, [])


@pytest.mark.parametrize("module", _on_floors(0, 1))
def test_the_pure_floors_touch_neither_files_nor_clock_nor_flags(module):
    touched = sorted(name for name in _imports(module) if name.split(".")[0] in IMPURE)
    assert not touched, f"{module} imports {touched}; floors 0 and 1 are pure"


def test_importing_the_pure_floors_pulls_in_nothing_foreign():
    program = (
        f"import importlib, sys\nfor name in {_on_floors(0, 1)!r}: importlib.import_module(name)\n"
        f"print(*sorted(sys.modules.keys() & {set(FOREIGN) - {'absl'}!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_init_files_define_and_re_export_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        rest = [node for node in body if not isinstance(node, ast.Expr)]
        assert not rest, f"{path}: line {rest[0].lineno} defines or imports something"


@pytest.mark.parametrize("module", sorted(_files()))
def test_a_file_is_at_most_400_lines_long(module):
    lines = len(_files()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{module} has {lines} lines; split it by nouns"
