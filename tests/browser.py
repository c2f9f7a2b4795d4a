"""A headless Chromium that tests look at pages with, spoken to in its own protocol, where it is installed."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PATIENCE_S = 60


class Page:
    """An open page, and what went on in it."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers = socket, count(1)
        self.errors: list[str] = []
        """Errors and warnings of the console, and violations of the page's policy."""
        self.requests: list[str] = []
        """Addresses that were asked for."""
        self.loads = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._socket.recv(timeout=_PATIENCE_S))
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, about: dict[str, Any]) -> None:
        match event:
            case "Page.loadEventFired":
                self.loads += 1
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(about["exceptionDetails"])[:2000])
            case "Log.entryAdded":
                self.errors.append(about["entry"]["text"])
            case "Runtime.consoleAPICalled":
                if about["type"] in ("error", "warning", "assert"):
                    self.errors.append(" ".join(str(one.get("value", one)) for one in about["args"]))

    def open(self, address: str) -> None:
        """Go to an address, and wait until it is loaded."""
        before = self.loads
        self.send("Page.navigate", url=address)
        self._wait_for_load(before)

    def follow(self, element: str) -> None:
        """Click an element, named by an expression, and wait until the page that it leads to is loaded."""
        before = self.loads
        self.value(f"({element}).click()")
        self._wait_for_load(before)

    def _wait_for_load(self, before: int) -> None:
        while self.loads == before:
            self._receive()

    def window(self, width: int, height: int = 900, *, dark: bool = False, media: str = "") -> None:
        """Set size and colours of the window, and ``print`` or ``screen`` as the medium."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, once it is there."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        done = self.send("Runtime.evaluate", expression=expression, allowUnsafeEvalBlockedByCSP=False, **options)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        self.value(
            f"new Promise((done, fail) => {{ const end = Date.now() + {_PATIENCE_S * 900}; const look = () => "
            f"({expression}) ? done(true) : Date.now() > end ? fail(new Error('never true')) : setTimeout(look, 50); "
            "look(); })"
        )

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write what is seen as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def printed(self) -> bytes:
        """Return the page as a PDF, as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True)["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start Chromium with an empty profile below a folder, and give its one page."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"]
    profile = folder / "profile"
    command = [CHROMIUM, *options, *quiet, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
        with connect(_page_address(address), max_size=None, open_timeout=_PATIENCE_S) as socket:
            yield Page(socket)
    finally:
        process.kill()
        process.wait()


def _page_address(address: str) -> str:
    """Return the address of the one page of a browser."""
    with connect(address, open_timeout=_PATIENCE_S) as socket:
        socket.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
        targets = json.loads(socket.recv(timeout=_PATIENCE_S))["result"]["targetInfos"]
    page = next(target["targetId"] for target in targets if target["type"] == "page")
    return f"{address.split('/devtools')[0]}/devtools/page/{page}"
