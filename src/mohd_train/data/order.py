"""The order in which a run sees its data: a pure function of the position in the run.

Position i = 0, 1, 2, ... counts samples since the start of the run, over all processes and epochs. What stands there
depends on the data, the mix and the seed alone: not on the number of processes, workers or epochs. So a resumed run needs
only its position to go on exactly.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


def interleave(shares: NDArray[np.float64], start: int, stop: int) -> tuple[Int64s, Int64s]:
    """Which domain stands at positions start..stop-1, and the how-manieth of its domain that sample is.

    Sample k of domain d is due at time (k + 1/2) / shares[d]; positions follow the due times. So after i samples each
    domain has shares[d] x i of them to within one for every other domain, in every window of the run.

    Args:
        shares: [D] positive, summing to 1.
        start, stop: window of positions.
    Returns:
        domain [stop-start] in 0..D-1, and ordinal within the domain [stop-start].
    """
    low, domain, ordinal = _due(shares, start, stop)
    skipped = start - int(low.sum())
    return domain[skipped : skipped + stop - start], ordinal[skipped : skipped + stop - start]


def counts(shares: NDArray[np.float64], total: int) -> Int64s:
    """Samples of each domain [D] among the first `total` positions of :func:`interleave`."""
    low, domain, _ = _due(shares, total, total)
    return low + np.bincount(domain[: total - int(low.sum())], minlength=len(shares))


def _due(shares: NDArray[np.float64], start: int, stop: int) -> tuple[Int64s, Int64s, Int64s]:
    """Samples in order of their due time, of a window that surely holds positions start..stop-1.

    Returns: low [D], how many of each domain come before the window; domain and ordinal of those in it.
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
    """Samples start..stop-1 of an endless walk over one domain: every sample once, then again in another order.

    Each pass orders the shards anew, cuts their concatenation in blocks of `block_size` samples and shuffles each block:
    at most a block's worth of shards is in use at a time, and only blocks in the window are worked out.

    Args:
        shard_samples: [shards] samples in each shard of the domain.
        name: of the domain, which seeds its walk.
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
