"""The origin of a file that this process writes: command, directory, version of this package and git revision."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from negcore import __version__

_CHECKOUT = Path(__file__).parents[2]


def written_by() -> dict[str, str]:
    """Return the command and directory of this process, the package's version and, in a git checkout, its revision."""
    found = {"command": this_command(), "directory": _directory(), "version": __version__, "revision": _revision()}
    return {name: value for name, value in found.items() if value is not None}


def this_command() -> str:
    """Return the command line of this process as one line of shell, without the passwords of addresses."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return re.sub(r"//[^/@\s]+@", "//***@", command)


def _directory() -> str | None:
    """Return the working directory, which relative paths are relative to; None if it was deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return None


@cache
def _revision() -> str | None:
    """Return the commit that the package is checked out at; None if it was installed, or git is absent."""
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
