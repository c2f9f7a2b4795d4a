"""Entry point of `neg`: it starts where the workflow's packages are missing too, and says what to install."""

import sys
from importlib.util import find_spec

WORKFLOW = (
    "fastapi",
    "grpc",
    "httpx",
    "jinja2",
    "markupsafe",
    "packaging",
    "prefect",
    "pydantic",
    "pydantic_core",
    "ray",
    "rich",
    "sqlalchemy",
    "typer",
    "uvicorn",
    "vl_convert",
    "yaml",
)
"""Modules of the packages in the extra `run`."""


def main() -> None:
    """Run the command line; where it cannot run at all, say why in one line and exit with code 2."""
    try:
        _main()
    except KeyboardInterrupt:  # while its modules are being imported
        sys.exit(130)


def _main() -> None:
    missing = [name for name in WORKFLOW if find_spec(name) is None]
    if missing:
        _refuse(f"the command needs {', '.join(missing)}; run: pip install 'neg-at-scale[run]'")
    try:
        import negcore  # noqa: F401
    except ImportError as error:  # on a system that it does not support
        _refuse(str(error))
    from flows.cli.app import main as run

    run()


def _refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
