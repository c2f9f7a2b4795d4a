"""The cost of checks is that of reading every byte once more, measured both ways on the same shards."""

from negcore.probing import checking_cost
from negcore.store import integrity


def test_only_the_checked_way_reads_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checking_cost, "_N_NEURONS", 8)
    hashed = []
    original = integrity.xxh3_128_hexdigest

    def hashing(content):
        hashed.append(original(content))
        return hashed[-1]

    monkeypatch.setattr(integrity, "xxh3_128_hexdigest", hashing)  # small files are hashed as they are read
    timing = checking_cost.time_checks(tmp_path, repeats=1)
    assert len(set(hashed)) == checking_cost.N_SHARDS
    assert (len(timing.fast_s), len(timing.plain_s)) == (1, 1)
    assert "MiB of NEGs, unchecked and checked" in timing.what
