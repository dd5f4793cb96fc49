"""The commands that documents spell out, taken from their text and run as users would type them:
within this process, in any folder, at :debug.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver

from policymix import app  # its flags stay, those of a main go with it

ROOT = pathlib.Path(app.__file__).parents[1]
# The environment of a process of its own: one device, as a laptop has.
ONE_DEVICE = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
}


def fenced(text: str, language: str = "bash") -> list[str]:
    """The contents of a document's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def of(text: str) -> list[list[str]]:
    """The commands of a shell text as lists of words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_docstring(text: str) -> list[list[str]]:
    """The commands of a docstring, where they stand on lines of their own."""
    return of("\n".join(re.findall(r"^ *(python experiments/(?:.*\\\n)*.*)$", text, re.MULTILINE)))


def section(text: str, heading: str) -> str:
    """What stands below a heading of Markdown, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    found = re.search(rf"^{re.escape(heading)}$", text, re.MULTILINE)
    assert found, f"no heading {heading!r}"
    rest = text[found.end() :]
    # A comment in a shell is no heading.
    plain = re.sub(r"^```.*?^```", lambda m: "." * len(m[0]), rest, flags=re.M | re.S)
    end = re.search(rf"^#{{1,{level}}} ", plain, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(text: str, header: str) -> list[list[str]]:
    """The rows of the Markdown table with this header line, as cells without their backticks."""
    lines = text.splitlines()
    rows = []
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def at_debug(words: list[str]) -> tuple[str, list[str]]:
    """["python", "experiments/NAME.py", "--flag"…] → (NAME.py, its arguments at :debug)."""
    python, main, *arguments = words
    assert (python, pathlib.Path(main).parent.name) == ("python", "experiments"), words
    return pathlib.Path(main).name, [_config_at_debug(argument) for argument in arguments]


def _config_at_debug(argument: str) -> str:
    if not argument.startswith("--config="):
        return argument
    path, _, words = argument.removeprefix("--config=").partition(":")
    return f"--config={ROOT / path}:{words + ',' if words else ''}debug"


def run(words: list[str], *more: str) -> None:
    """Runs a command with further flags; what goes wrong is raised instead of printed."""
    name, arguments = at_debug(words)
    argv = [name, *arguments, *more]
    before = sys.argv
    with flagsaver.flagsaver():  # forgets the flags that this main defines
        spec = importlib.util.spec_from_file_location(name[:-3], ROOT / "experiments" / name)
        main = importlib.util.module_from_spec(spec)
        try:
            sys.argv = argv  # where config flags look for the fields that are overridden
            spec.loader.exec_module(main)
            rest = flags.FLAGS(argv)
            assert not rest[1:], rest
            main.main()
        finally:
            sys.argv = before


def flags_of_mains() -> set[str]:
    """The names of the flags of all mains, and of those they share."""
    files = [*(ROOT / "experiments").rglob("*.py"), ROOT / "policymix/app.py"]
    text = "".join(path.read_text() for path in files)
    found = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", text)
    return {*found, "config"}


def run_apart(words: list[str], *more: str) -> str:
    """The same in a process of its own, with one device; returns what it prints."""
    name, arguments = at_debug(words)
    command = [sys.executable, str(ROOT / "experiments" / name), *arguments, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ONE_DEVICE)
    assert done.returncode == 0, done.stderr
    return done.stdout
