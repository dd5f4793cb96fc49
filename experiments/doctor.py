"""Says what is installed, what is missing, and the command that mends it.

python experiments/doctor.py
"""

import sys

try:
    from absl import flags

    from policymix import app
    from policymix.runs import doctor
except ModuleNotFoundError as error:  # what it is for: also where hardly anything is installed
    sys.exit(f"error: {error.name} is missing: make venv installs it, into .venv")

_CONFIG = app.define_config(__file__)


def main() -> None:
    findings = doctor.examine()
    print(doctor.table(findings))
    broken = [finding.what for finding in findings if finding.state == "broken"]
    if broken and not flags.FLAGS.dry_run:
        raise ValueError(f"broken: {', '.join(broken)}; the lines above say how to mend it")


if __name__ == "__main__":
    app.run(main)
