"""Start what the demo starts, with nothing of ours, and print "ready": a limit that its first shard cannot beat.

A Prefect server that answers, Ray, and two actors that have imported torch and transformers, all started at once.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from importlib import import_module
from pathlib import Path

N_ACTORS = 2
NEEDED = ("torch", "transformers.modeling_utils")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        server = _server(Path(folder), port)
        try:
            _ray_with_torch()
            _wait_for(f"http://127.0.0.1:{port}/api/health")
            print("ready", flush=True)
        finally:
            server.terminate()
            server.wait()


def _server(home: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"PREFECT_HOME": str(home), "PREFECT_API_URL": "", "DO_NOT_TRACK": "1"}
    with (home / "log").open("wb") as log:
        return subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)


def _ray_with_torch() -> None:
    import ray

    ray.init(address="local", include_dashboard=False, object_store_memory=2**28, log_to_driver=False)

    class Actor:
        def import_all(self) -> None:
            for name in NEEDED:
                import_module(name)

    actors = [ray.remote(num_cpus=1)(Actor).remote() for _ in range(N_ACTORS)]
    there = [actor.import_all.remote() for actor in actors]
    for name in ("prefect", *NEEDED):
        import_module(name)
    ray.get(there)


def _wait_for(url: str) -> None:
    while True:
        with suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.05)


if __name__ == "__main__":
    main()
