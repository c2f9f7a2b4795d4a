"""Hosts on this machine, as far apart as Linux can set them: a Ray head, a worker and a driver behind a switch.

Each host has an address, a host name, process ids, a `/tmp`, a `/dev/shm` and a home of its own; they share one
directory at the same path, as a cluster does. All of it lives in namespaces of its own and hangs on one pipe to this
process: whatever becomes of this process, the kernel then ends theirs and takes the links down. The machine's own
network is left as it is. It takes root.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from fault_bench import POLL_S, RAY, Bench, Run
from support import REPOSITORY

RAY_COMMAND = Path(sys.executable).with_name("ray")
_ADDRESSES = {"head": "10.231.0.1", "worker": "10.231.0.2", "driver": "10.231.0.3"}
_WATCH = Path(__file__).with_name("network_watch.py")
_START_S = 120.0

HEAD_PORT = 6379
NODE_PORTS = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "runtime-env-agent-port": 6382,
    "dashboard-agent-grpc-port": 6383,
    "dashboard-agent-listen-port": 6384,
    "metrics-export-port": 8080,
}
"""Options of `ray start` on every node."""
WORKER_PORTS = range(10002, 10100)
"""Ports of actors and drivers, one for each process of a node."""

_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": "/tmp/home/ray-token",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "DO_NOT_TRACK": "1",
    "HOME": "/tmp/home",
    "TMPDIR": "/tmp",
}

_SETUP = r"""
set -e
hostname "$1"
token=$2
shift 2
mount --bind /tmp /mnt
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
for place in "$@"; do
  [[ $place == /tmp/* ]] || continue
  mkdir -p "$place"
  mount --bind "/mnt/${place#/tmp/}" "$place"
done
umount /mnt
mkdir -m 700 /tmp/home
install -m 600 "$token" /tmp/home/ray-token
ip link set lo up
echo ready
while read -r _; do :; done
"""


@cache
def why_no_hosts() -> str | None:
    """Return why there can be no hosts here; None if there can be."""
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: make cluster-tools"
    if os.geteuid() != 0:
        return "namespaces for the network need root"
    tried = subprocess.run(
        [*_UNSHARE, "ip", "link", "add", "s", "type", "bridge"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return None if tried.returncode == 0 else f"no namespaces here: {' '.join(tried.stderr.split())}"


_UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


class Connection(NamedTuple):
    """The first packet of a connection between two hosts."""

    source: str
    target: str
    port: int


class Host:
    """Namespaces of a host, which live as long as their first process, and that as long as its standard input."""

    def __init__(self, name: str, shared: Path, token: Path) -> None:
        self.name, self.address = name, _ADDRESSES.get(name, "")
        self._started: list[subprocess.Popen[bytes]] = []
        places = (shared, REPOSITORY, Path(sys.prefix))
        self._outer = subprocess.Popen(
            [*_UNSHARE, "bash", "-c", _SETUP, "host", name, token, *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._outer.stdout is not None
        ready = self._outer.stdout.readline() == "ready\n"
        if not ready:
            self._outer.kill()
            raise RuntimeError(f"no host {name}")
        (self.first,) = psutil.Process(self._outer.pid).children()

    def inside(self, *command: Any) -> list[str]:
        """Return a command that runs another one on this host."""
        enter = ("nsenter", f"--target={self.first.pid}", "--net", "--uts", "--ipc", "--mount", "--pid")
        return [*enter, *map(str, command)]

    def network(self, *command: Any) -> str:
        """Run a command in the network of this host, and nothing else of it; return what it prints."""
        enter = ["nsenter", f"--target={self.first.pid}", "--net"]
        return subprocess.run([*enter, *map(str, command)], check=True, capture_output=True, text=True).stdout

    def start(self, *command: Any, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on this host."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.inside(*command), env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self._started.append(process)
        return process

    def actors(self) -> list[psutil.Process]:
        """Return the actors that run on this host."""
        with suppress(psutil.NoSuchProcess):
            space = _space(self.first)
            named = (one for one in psutil.process_iter(["name"]) if one.info["name"].startswith("ray::_Host"))
            return [one for one in named if _space(one) == space]
        return []

    def end(self) -> None:
        """End every process of this host at once, and with the last its link."""
        assert self._outer.stdin is not None and self._outer.stdout is not None
        with suppress(BrokenPipeError):
            self._outer.stdin.close()
        self._outer.stdout.close()
        while self._outer.poll() is None:
            self._let_go()
            time.sleep(POLL_S)
        for process in self._started:
            process.wait()

    def _let_go(self) -> None:
        """Continue what entered this host, stopped with its child and did not see it die: the host waits for it."""
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                entered = f"--target={self.first.pid}" in process.cmdline() and process.children()
                if entered and all(child.status() == psutil.STATUS_ZOMBIE for child in process.children()):
                    process.resume()


def _space(process: psutil.Process) -> str:
    with suppress(OSError):
        return str(Path(f"/proc/{process.pid}/ns/pid").readlink())
    return ""


@dataclass
class Cluster:
    """Three hosts and a switch between them."""

    home: Path
    switch: Host
    hosts: dict[str, Host]
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"{_ADDRESSES['head']}:{HEAD_PORT}"

    def cut(self, name: str) -> None:
        """Pull the plug of a host: packets are lost without a word."""
        self.switch.network("ip", "link", "set", name, "down")

    def mend(self, name: str) -> None:
        self.switch.network("ip", "link", "set", name, "up")

    def lose(self, name: str) -> None:
        """Switch a host off, and unplug it: its link may outlive it for a moment."""
        self.hosts.pop(name).end()
        with suppress(subprocess.CalledProcessError):
            self.switch.network("ip", "link", "delete", name)

    def add(self, name: str, *ray: str) -> None:
        """Switch a host on, plug it in, and start its Ray node."""
        host = self.hosts[name] = Host(name, self.home, self.home / "ray-token")
        peer = ("peer", "name", "eth0", "netns", host.first.pid)
        self.switch.network("ip", "link", "add", name, "type", "veth", *peer)
        self.switch.network("ip", "link", "set", name, "master", "switch", "up")
        host.network("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.network("ip", "link", "set", "eth0", "up")
        self.start_ray(name, *ray)

    def start_ray(self, name: str, *options: str) -> None:
        """Start a Ray node with every port fixed, and wait until the head knows it."""
        host = self.hosts[name]
        role = ["--head", f"--port={HEAD_PORT}", "--include-dashboard=false"]
        if name != "head":
            role = [f"--address={self.address}"]
        command = [
            RAY_COMMAND, "start", *role, f"--node-ip-address={host.address}",
            *(f"--{option}={port}" for option, port in NODE_PORTS.items()),
            f"--min-worker-port={WORKER_PORTS[0]}", f"--max-worker-port={WORKER_PORTS[-1]}",
            "--object-store-memory=100000000", "--block", *options,
        ]  # fmt: skip
        log = self.home / f"ray-{name}.log"
        node = host.start(*command, log=log, environment=self.environment)
        self._await(node, host, log)

    def _await(self, node: subprocess.Popen[bytes], host: Host, log: Path) -> None:
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray node on {host.name}: {log.read_text()}")
            time.sleep(POLL_S)

    def connections(self) -> set[Connection]:
        """Return the connections that were opened between hosts since the switch is there."""
        names = {address: name for name, address in _ADDRESSES.items()}
        lines = (line.split() for line in (self.home / "connections.txt").read_text().splitlines())
        return {Connection(names[source], names[target], int(port)) for source, target, port in lines}

    def listening(self, name: str) -> str:
        """Return the sockets of a host that listen, with their processes."""
        return self.hosts[name].network("ss", "-Hltnp")


@contextmanager
def three_hosts(home: Path) -> Iterator[Cluster]:
    """Start a cluster: a head and a worker with one CPU each, and a host for drivers with none.

    Parameters
    ----------
    home : Path
        The directory that the hosts share.
    """
    token = home / "ray-token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    with ExitStack() as stack:
        switch = Host("switch", home, token)
        stack.callback(switch.end)
        cluster = Cluster(home, switch, {}, inherited | _SETTINGS)
        stack.callback(lambda: [host.end() for host in cluster.hosts.values()])
        switch.network("ip", "link", "add", "switch", "type", "bridge")
        switch.network("ip", "link", "set", "switch", "up")
        watch = switch.start(
            sys.executable, "-I", _WATCH, home / "connections.txt", log=home / "switch.log", environment=inherited
        )
        while not (home / "connections.txt").exists():
            assert watch.poll() is None, (home / "switch.log").read_text()
            time.sleep(POLL_S)
        cluster.add("head", "--num-cpus=1")
        cluster.add("worker", "--num-cpus=1")
        cluster.add("driver", "--num-cpus=0")
        yield cluster


class HostRun(Run):
    """A run whose driver is on a host of its own."""

    def __init__(self, bench: Bench, cluster: Cluster, name: str, *options: str, host: str = "driver") -> None:
        own = {**_SETTINGS, "RAY_ADDRESS": cluster.address}
        super().__init__(bench, bench.home / name, *RAY, *options, **own)
        self._command = cluster.hosts[host].inside(*self._command)

    def inherit(self, other: "HostRun") -> None:
        """Hold this run to what another one of the directory had finished."""
        self._seen = dict(other._seen)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the driver stand still, with the program that entered its host: this one stops when its child does."""
        (driver,) = psutil.Process(self.driver.pid).children()
        driver.suspend()
        while psutil.Process(self.driver.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(POLL_S)
        try:
            yield
        finally:
            with suppress(psutil.NoSuchProcess):
                driver.resume()
            with suppress(psutil.NoSuchProcess):  # it may stop once more for a stop of its child that it had not seen
                while psutil.Process(self.driver.pid).status() == psutil.STATUS_STOPPED:
                    self.driver.send_signal(signal.SIGCONT)
                    time.sleep(POLL_S)
