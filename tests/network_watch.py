"""A program that writes down who opens connections to whom in a network; the tests of several hosts start it."""

import socket
import sys
from pathlib import Path


def watch(file: Path) -> None:
    """Write down the first packet of every connection that passes this network: source, target and port."""
    every_protocol, ipv4, tcp, udp, syn, ack = 3, b"\x08\x00", 6, 17, 2, 16
    seen = set()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(every_protocol)) as wire, file.open("w") as out:
        while True:
            frame = wire.recv(65535)
            packet = frame[14:]
            if frame[12:14] != ipv4 or packet[9] not in (tcp, udp):
                continue
            start = 4 * (packet[0] & 15)
            if packet[9] == tcp and packet[start + 13] & (syn | ack) != syn:
                continue
            port = int.from_bytes(packet[start + 2 : start + 4])
            line = f"{socket.inet_ntoa(packet[12:16])} {socket.inet_ntoa(packet[16:20])} {port}"
            if line not in seen:
                seen.add(line)
                print(line, file=out, flush=True)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
