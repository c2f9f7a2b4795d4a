"""Bits flipped between two starts of a run: in the files of a model, its converted copy, and copies out of a bucket."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from fault_bench import LOCAL, LONGEST_RUN_S, Bench, CannotTry, Files, Outcome, Run, published, write_rows
from support import NEG
from xxhash import xxh3_128_hexdigest


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


def flipped_conversion(bench: Bench) -> Outcome:
    """The converted copy of a packaged model loses a bit between two runs: the second makes the copy again."""
    cache = bench.home / "model-cache"
    before = _shards_with_packaged_model(bench, cache, "converted")
    (weights,) = (cache / "gguf").glob("*/model.safetensors")
    whole = weights.read_bytes()
    flip(weights, bench.random.randrange(len(whole) // 2, len(whole)), bench)
    again = _shards_with_packaged_model(bench, cache, "converted-again")
    return Outcome(1, int(again == before and weights.read_bytes() == whole))


def _shards_with_packaged_model(bench: Bench, cache: Path, name: str) -> Files:
    """Return the shards of a small run of SmolLM2, with its converted copy in this cache."""
    out = bench.home / name
    options = ["--model", "smollm2-135m", "--dataset", "mini/fact", "--limit", "4", "--orchestrator", "none", *LOCAL]
    environment = os.environ | {"NEG_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [NEG, "extract", *options, "--out", out]
    subprocess.run(command, env=environment, capture_output=True, timeout=LONGEST_RUN_S, check=True)
    return published(out)


def flipped_bucket(bench: Bench) -> Outcome:
    """Of a run in a bucket, the local copy of a shard loses a bit, then the shard in the bucket itself.

    The same command makes both whole again, and its results are those from before.
    """
    if find_spec("moto") is None:
        raise CannotTry("moto is not installed")
    with _bucket() as (client, settings):
        run = _BucketRun(bench, client, os.environ | settings | {"NEG_CACHE": str(bench.home / "bucket-cache")})
        expected = run.results()
        copies = bench.home / "bucket-cache" / "shards"
        copy = bench.random.choice(sorted(copies.glob("*.arrow")))
        flip(copy, bench.random.randrange(copy.stat().st_size), bench)
        from_copy = run.results() == expected and xxh3_128_hexdigest(copy.read_bytes()) == copy.stem
        key = bench.random.choice(sorted(run.shards()))
        content = bytearray(run.shards()[key])
        content[bench.random.randrange(len(content))] ^= 1 << bench.random.randrange(8)
        client.put_object(Bucket="runs", Key=key, Body=bytes(content))
        shutil.rmtree(copies)
        from_object = run.results() == expected
    return Outcome(2, from_copy + from_object)


class _BucketRun:
    """A pipeline into a bucket, with few rows."""

    def __init__(self, bench: Bench, client: Any, environment: Mapping[str, str]) -> None:
        rows = write_rows(bench.home / "bucket.jsonl", 36)
        self._client, self._environment = client, environment
        self._command = [NEG, "pipeline", "--model", bench.model, "--dataset", rows, "--shard-rows", "6", *LOCAL]
        self._command += ["--orchestrator", "none", "--out", "s3://runs/flipped"]

    def results(self) -> tuple[Any, Files]:
        """Run it, and return its accuracies and shards."""
        subprocess.run(self._command, env=self._environment, capture_output=True, timeout=LONGEST_RUN_S, check=True)
        table = pa.ipc.open_file(pa.py_buffer(self._read("flipped/accuracy.arrow"))).read_all()
        return table.to_pylist(), self.shards()

    def shards(self) -> Files:
        keys = [one["Key"] for one in self._client.list_objects_v2(Bucket="runs", Prefix="flipped/negs/")["Contents"]]
        return {key: self._read(key) for key in keys if key.endswith(".arrow")}

    def _read(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket="runs", Key=key)["Body"].read())


@contextmanager
def _bucket() -> Iterator[tuple[Any, dict[str, str]]]:
    """A bucket ``runs`` behind moto on a free loopback port: a client for it, and what programs need to reach it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with patch.dict(os.environ, settings):
            client = boto3.client("s3", endpoint_url=url)
            client.create_bucket(Bucket="runs")
            yield client, settings | {"AWS_ENDPOINT_URL": url}
    finally:
        server.stop()
