"""The anonymous memory (`RssAnon`) of this process, and the most of it while something goes on.

Pages of mapped files, such as those of weights while they are read, are not counted: the system drops them where memory
is short.
"""

import re
import threading
from pathlib import Path


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    (kibibytes,) = re.findall(r"(?m)^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text())
    return int(kibibytes) * 1024


class Peak(threading.Thread):
    """Looks at the memory every few milliseconds, from its start on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak_bytes = anonymous_bytes()
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self._peak_bytes = max(self._peak_bytes, anonymous_bytes())

    def end(self) -> int:
        """Return the most bytes there were."""
        self._ended.set()
        self.join()
        return self._peak_bytes
