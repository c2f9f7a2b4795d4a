"""The script that draws figures in a browser: Vega, Vega-Lite and Vega-Embed, as vl-convert brings them along.

They are joined to one script once for a machine, which takes seconds, and kept in the cache.
"""

from contextlib import suppress
from functools import cache
from importlib.metadata import version

import vl_convert

from negcore.errors import NegError
from negcore.store.files import cache_directory, draft
from negcore.store.identity import text_hash


@cache
def vega_script() -> str:
    """Return the script, which names `vegaEmbed` for others."""
    name = f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError, NegError, ValueError):  # a copy that cannot be read, or is damaged, is none
        digest, _, script = (cache_directory() / "scripts" / name).read_text(encoding="utf-8").partition("\n")
        if digest == text_hash(script):
            return script
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    with suppress(OSError, NegError), draft(cache_directory() / "scripts" / name) as path:
        path.write_text(f"{text_hash(script)}\n{script}", encoding="utf-8")
    return script
