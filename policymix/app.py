"""What every main shares: the flags, the config, and errors of one line."""

import logging as python_logging
import pathlib
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

_LONGEST = 2000  # letters of an error: names in damaged files may have any length

_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Build everything from shapes, print the plan, touch nothing."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace existing output.")
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show details, and the traceback of an error.")


def define_config(main_file: str, default: str = "common.py") -> flags.FlagHolder:
    """--config=FILE[:debug]; the default lies in configs/, beside the folder of the main."""
    root = pathlib.Path(main_file).resolve().parents[1]
    if str(root) not in sys.path:  # config files import configs.common
        sys.path.insert(0, str(root))
    path = str(root / "configs" / default)
    told = "FILE[:debug], and --config.section.field=value."
    try:  # overrides of the default are looked at here, those of another file when flags are read
        return config_flags.DEFINE_config_file("config", path, told)
    except Exception as error:
        if "--verbose" in sys.argv:
            traceback.print_exc()
        _fail(f"flags: {_one_line(error.__cause__ or error)}")
        raise


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; what goes wrong is one line and a non-zero exit."""
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # a config file is a program, and may fail in any way
        if "--verbose" in argv:
            traceback.print_exc()
        _fail(f"flags: {_one_line(error)}")
    if rest[1:]:
        _fail(
            f"flags: unexpected argument {rest[1]!r}; every option starts with -- (and lists have "
            "no spaces: a,b,c)"
        )
    return rest


def _guarded(main: Callable[[], None]) -> None:
    if _VERBOSE.value:
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger("policymix").setLevel(python_logging.INFO)
        return main()
    quiet()
    try:
        return main()
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left", code=130)
    except Exception as error:  # a bug ends in one line too, and --verbose shows where
        expected = isinstance(error, ValueError | OSError | FloatingPointError)
        kind = "" if expected else f"{type(error).__name__}: "
        _fail(kind + _one_line(error) + ("" if expected else " (--verbose shows the traceback)"))


def quiet() -> None:
    """Only our own words from here on, and errors where they are caught."""
    # Orbax's log would bury the rest, and its errors reach us anyway.
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("policymix").setLevel(python_logging.WARNING)
    warnings.filterwarnings("ignore")
    # Threads and callbacks of a failing save print tracebacks of their own, before and after ours.
    python_logging.getLogger("concurrent.futures").setLevel(python_logging.CRITICAL + 1)
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = text.split(" [tensorstore_spec")[0]
    # ml_collections passes on the repr of a message.
    text = text.replace("\\n", " ").replace("\\'", "'")
    if "Traceback (most recent call last)" in text:  # a config file failed: its last line says why
        text = text.strip().splitlines()[-1].partition("Error: ")[2] or text
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
