"""Bits flipped in the files of a model between two starts of a run."""

import os
from pathlib import Path

from fault_bench import LOCAL, Bench, Outcome, Run, published


def flipped_weights(bench: Bench) -> Outcome:
    """The weights change while a run is stopped: the same command refuses to go on, and goes on once they are back."""
    weights = bench.model / "model.safetensors"
    whole = weights.read_bytes()
    run = Run(bench, bench.home / "weights", *LOCAL)
    run.start()
    tried = refused = 0
    try:
        for n_shards in bench.shard_counts(1):
            if not run.wait_for(n_shards):
                break
            run.kill()
            before = published(run.directory)
            flip(weights, bench.random.randrange(len(whole) // 2, len(whole)), bench)
            tried += 1
            refused += run.finish() != 0 and run.says("model_revision") and published(run.directory) == before
            weights.write_bytes(whole)
            run.start()
        return run.outcome(tried, ok=run.end() == 0 and refused == tried)
    finally:
        weights.write_bytes(whole)


def flip(file: Path, place: int, bench: Bench) -> None:
    """Flip one bit in place, and set the time of writing back."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << bench.random.randrange(8)]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
