"""What pyproject.toml asks of a Python: `environment.py check|install GROUP…`; groups are build, run and the extras.

check exits 0 when this Python has all of it; install adds what is missing. Works with nothing but pip (whose parser it borrows).
"""
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pip._vendor import tomli
from pip._vendor.packaging.requirements import Requirement


def requirements(groups):
    """The requirement lines of the groups."""
    project = tomli.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    lines = {"build": project["build-system"]["requires"], "run": project["project"]["dependencies"],
             **project["project"]["optional-dependencies"]}
    return [line for group in groups for line in lines[group]]


def missing(lines):
    """Those of the requirement lines that this Python does not meet."""
    def met(requirement):
        try:
            return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            return False
    return [line for line in lines if not met(Requirement(line))]


def main(action, *groups):
    absent = missing(requirements(groups))
    if action == "install" and absent:
        return subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *absent])
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
