"""Compare shards with Parquet files of the same rows: bytes, and the time to read one layer.

`python -m tests.compare_formats RUN DATASET`
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq


def timed(work: Callable[[], object]) -> float:
    """Return the least seconds of a core that some work takes in three tries."""
    tries = []
    for _ in range(3):
        began = time.process_time()
        work()
        tries.append(time.process_time() - began)
    return min(tries)


def table(shard: Path) -> pa.Table:
    return pa.Table.from_batches([pa.ipc.open_file(pa.memory_map(str(shard))).get_batch(0)])


def read_layer(shard: Path, column: str) -> object:
    return table(shard).column(column).chunk(0).values.to_numpy().sum()


def report(run: Path, dataset: str) -> None:
    """Print a line for Arrow and for each way to write Parquet."""
    shards = sorted(run.glob(f"negs/*/dataset={quote(dataset, safe='')}/*/*.arrow"))
    names = table(shards[0]).column_names
    layer = names[-1]
    leaves = [f"{name}.list.element" for name in names if name.startswith(("act_", "neg_"))]
    ways = {
        "Parquet, as by default": {},
        "Parquet, zstd": {"compression": "zstd"},
        "Parquet, zstd, split": {"compression": "zstd", "use_dictionary": False, "use_byte_stream_split": leaves},
    }
    seconds = sum(timed(lambda shard=shard: read_layer(shard, layer)) for shard in shards)
    print(f"{'Arrow':24} {sum(shard.stat().st_size for shard in shards) / 2**20:8.1f} MiB, one layer {seconds:.3f} s")
    with TemporaryDirectory() as folder:
        for title, options in ways.items():
            files = [Path(folder) / f"{number}.parquet" for number in range(len(shards))]
            for shard, file in zip(shards, files, strict=True):
                pq.write_table(table(shard), file, **options)
            seconds = sum(timed(lambda file=file: pq.read_table(file, columns=[layer])) for file in files)
            print(
                f"{title:24} {sum(file.stat().st_size for file in files) / 2**20:8.1f} MiB, one layer {seconds:.3f} s"
            )


if __name__ == "__main__":
    report(Path(sys.argv[1]), sys.argv[2])
