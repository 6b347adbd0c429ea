"""The order in which a run sees its data: a pure function of the position in the run.

Position i = 0, 1, 2, ... counts samples since the start of the run, over all processes and epochs. The sample at a
position depends on the data, the mix and the seed alone, not on the number of processes, workers or epochs. So a run
resumes exactly from its position.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


def interleave(shares: NDArray[np.float64], start: int, stop: int) -> tuple[Int64s, Int64s]:
    """The domain at each position start..stop-1, and the index of that sample within its domain.

    Sample k of domain d is due at time (k + 1/2) / shares[d], and positions follow the due times. So after i samples,
    domain d has had shares[d] x i of them, to within one sample per other domain.

    Args:
        shares: [D] positive, summing to 1.
        start, stop: window of positions.
    Returns:
        domain [stop-start] in 0..D-1, and index within the domain [stop-start].
    """
    low, domain, ordinal = _due(shares, start, stop)
    skipped = start - int(low.sum())
    return domain[skipped : skipped + stop - start], ordinal[skipped : skipped + stop - start]


def counts(shares: NDArray[np.float64], total: int) -> Int64s:
    """Samples of each domain [D] among the first `total` positions of :func:`interleave`."""
    low, domain, _ = _due(shares, total, total)
    return low + np.bincount(domain[: total - int(low.sum())], minlength=len(shares))


def _due(shares: NDArray[np.float64], start: int, stop: int) -> tuple[Int64s, Int64s, Int64s]:
    """Samples in order of due time, of a window that is sure to contain positions start..stop-1.

    Returns: low [D], how many of each domain come before the window; domain and index of those in it.
    """
    margin = len(shares)  # the sample at position i is due within D/2 + 1 of time i
    low = np.maximum(0, np.floor(shares * (start - margin)).astype(np.int64) - 1)
    high = np.ceil(shares * (stop + margin)).astype(np.int64) + 1
    domain = np.repeat(np.arange(len(shares)), high - low)
    ordinal = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    by_time = np.lexsort((domain, (ordinal + 0.5) / shares[domain]))
    return low, domain[by_time], ordinal[by_time]


def walk(
    shard_samples: Int64s, start: int, stop: int, *, name: str, seed: int, block_size: int, shuffle: bool
) -> Int64s:
    """Samples start..stop-1 of an endless walk over one domain: every sample once, then all of them again in another order.

    Each pass permutes the shards, cuts their concatenation into blocks of `block_size` samples and shuffles each block. So
    only a block's worth of shards is in use at a time, and only the blocks in the window are computed.

    Args:
        shard_samples: [shards] samples in each shard of the domain.
        name: the domain's, which is part of the seed.
        block_size: samples shuffled together.
    Returns:
        [stop-start] index of the sample within its domain.
    """
    total = int(shard_samples.sum())
    pieces = [np.empty(0, np.int64)]
    for lap in range(start // total, -(-stop // total)):
        first, last = max(start - lap * total, 0), min(stop - lap * total, total)
        if not shuffle:
            pieces.append(np.arange(first, last))
            continue
        key = [seed, zlib.crc32(name.encode()), lap]
        shards = np.random.default_rng(key).permutation(len(shard_samples))
        ends = shard_samples[shards].cumsum()
        shift = (shard_samples.cumsum() - shard_samples)[shards] - (ends - shard_samples[shards])
        for block in range(first // block_size, -(-last // block_size)):
            begin, end = block * block_size, min((block + 1) * block_size, total)
            mixed = begin + np.random.default_rng([*key, block]).permutation(end - begin)
            place = mixed[max(first - begin, 0) : min(last, end) - begin]
            pieces.append(place + shift[np.searchsorted(ends, place, side="right")])
    return np.concatenate(pieces)
