"""Which documents are validation. By content, so that no text is on both sides, however often and wherever it occurs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_SHARE = 0.1  # of a domain's tokens that goes to validation, where that fills a sample
_EMERGENCY_SHARE = 0.5

Documents = Iterable[tuple[NDArray[np.int64], NDArray[np.uint64]]]  # (tokens in each, digest of each) by unit


@dataclass(frozen=True)
class Target:
    """Validation tokens wanted of a domain, and those asked for before the domain's size capped them."""

    tokens: int
    asked: int


def target(val_tokens: int, share: float, domain_tokens: int, seq_len: int) -> Target:
    """A domain's part of `val_tokens`: at least a sample, at most a tenth of the domain (half, if that is below a sample)."""
    if val_tokens == 0:
        return Target(0, 0)
    asked = max(round(val_tokens * share), seq_len)
    cap = max(LARGEST_SHARE * domain_tokens, min(seq_len, _EMERGENCY_SHARE * domain_tokens))
    return Target(int(min(asked, cap)), asked)


def select(documents: Documents, tokens: int, domain_tokens: int) -> NDArray[np.uint64]:
    """Digests of the documents that make up about `tokens` validation tokens: those of the smallest digests.

    A digest is a random number that only the text decides, so the choice is random, the same for any order of the
    documents, and made in one pass and little memory. Documents of more than 2 x `tokens` are passed over, unless there
    are no others; never is more than half of the domain taken.
    """
    if tokens <= 0:
        return np.empty(0, np.uint64)
    pool_lengths, pool_digests = np.empty(0, np.int64), np.empty(0, np.uint64)
    shortest: tuple[int, int] | None = None
    for lengths, digests in documents:
        if len(lengths):
            i = int(np.lexsort((digests, lengths))[0])
            candidate = (int(lengths[i]), int(digests[i]))
            shortest = candidate if shortest is None else min(shortest, candidate)
        fits = lengths <= 2 * tokens
        pool_lengths, pool_digests = _smallest(
            np.concatenate([pool_lengths, lengths[fits]]), np.concatenate([pool_digests, digests[fits]]), tokens
        )
    if not len(pool_digests) and shortest is not None:
        pool_lengths, pool_digests = np.array([shortest[0]]), np.array([shortest[1]], np.uint64)
    return pool_digests[pool_lengths.cumsum() <= _EMERGENCY_SHARE * domain_tokens]


def _smallest(
    lengths: NDArray[np.int64], digests: NDArray[np.uint64], tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The fewest documents of smallest digests, one of each, that hold at least `tokens`."""
    unique, first = np.unique(digests, return_index=True)  # sorted
    needed = int(np.searchsorted(lengths[first].cumsum(), tokens)) + 1
    return lengths[first][:needed], unique[:needed]


class Sorter:
    """Sends a domain's documents to train, to validation, or (copies of validation documents) to neither."""

    def __init__(self, own: NDArray[np.uint64], everywhere: NDArray[np.uint64]) -> None:
        """Args: own: digests that are this domain's validation; everywhere: those of all domains, `own` among them."""
        self._left = set(own.tolist())
        self._everywhere = everywhere

    def sort(self, digests: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(train, val) masks [documents]; the first copy of a validation document is validation, later ones are neither."""
        hit = np.isin(digests, self._everywhere)
        val = np.zeros(len(digests), bool)
        for i in np.flatnonzero(hit):
            digest = int(digests[i])
            if digest in self._left:
                self._left.remove(digest)
                val[i] = True
        return ~hit, val
