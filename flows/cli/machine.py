"""Checks of the machine before a run starts anything: a library that trips over these says so with a traceback."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from negcore.errors import RunError


def check_machine() -> None:
    """Refuse a machine on which a run cannot start.

    Raises
    ------
    RunError
        If there is no home or temporary directory, or a proxy is set that cannot be used; every problem is named.
    """
    if problems := machine_problems():
        raise RunError("; ".join(problems))


def machine_problems() -> list[str]:
    """Return a line for everything that keeps a run from starting on this machine."""
    return [*_directories(), *_proxies()]


def _directories() -> Iterator[str]:
    try:
        Path.home()
    except RuntimeError:
        yield f"HOME is not set, and user {os.getuid()} has no home directory: set HOME to a directory you can write to"
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        yield f"there is no temporary directory to write to ({error.strerror}): make room, or set TMPDIR"


def _proxies() -> Iterator[str]:
    """Name the proxies that the clients of Prefect and the hub refuse; values may hold passwords and are not shown."""
    for kind, url in getproxies_environment().items():
        if kind == "no":
            continue
        try:
            scheme = urlsplit(url if "://" in url else f"http://{url}").scheme
        except ValueError as error:
            yield f"{kind}_proxy is no address ({error}): mend it, or unset it"
            continue
        if scheme in ("socks5", "socks5h"):
            if find_spec("socksio") is None:
                yield f"{kind}_proxy is a SOCKS proxy, which needs a package: pip install 'httpx[socks]', or unset it"
        elif scheme not in ("http", "https"):
            yield f"{kind}_proxy begins with {scheme!r}; allowed: http, https, socks5, socks5h"
