"""Which documents are validation. Chosen by content, so that no text is on both sides however often it occurs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_SHARE = 0.1  # of a domain's tokens that goes to validation, if that fills a sample
_EMERGENCY_SHARE = 0.5

Documents = Iterable[tuple[NDArray[np.int64], NDArray[np.uint64]]]  # (tokens in each, digest of each) by unit


@dataclass(frozen=True)
class Target:
    """Validation tokens to take from a domain, and the number asked for before the domain's size capped it."""

    tokens: int
    asked: int


def target(val_tokens: int, share: float, domain_tokens: int, seq_len: int) -> Target:
    """A domain's part of `val_tokens`: at least one sample, at most a tenth of the domain (half, if a tenth is less than a
    sample)."""
    if val_tokens == 0:
        return Target(0, 0)
    asked = max(round(val_tokens * share), seq_len)
    cap = max(LARGEST_SHARE * domain_tokens, min(seq_len, _EMERGENCY_SHARE * domain_tokens))
    return Target(int(min(asked, cap)), asked)


def select(documents: Documents, tokens: int, domain_tokens: int) -> NDArray[np.uint64]:
    """Digests of the documents that make up about `tokens` validation tokens: those with the smallest digests.

    A digest is a pseudorandom number that depends on the text alone. So the choice is random, doesn't depend on the order
    of the documents, and takes one pass and little memory. Documents longer than 2 x `tokens` are skipped unless there are
    no others, and at most half of the domain is taken.
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
    """The fewest documents with the smallest digests, counting copies once, that hold at least `tokens`."""
    unique, first = np.unique(digests, return_index=True)  # sorted
    needed = int(np.searchsorted(lengths[first].cumsum(), tokens)) + 1
    return lengths[first][:needed], unique[:needed]


class Sorter:
    """Assigns a domain's documents to train, to validation, or (copies of validation documents) to neither."""

    def __init__(self, own: NDArray[np.uint64], everywhere: NDArray[np.uint64]) -> None:
        """Args: own: digests of this domain's validation; everywhere: those of all domains, including `own`."""
        self._left = set(own.tolist())
        self._everywhere = everywhere

    def sort(self, digests: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(train, val) masks [documents]. The first copy of a validation document goes to validation, later ones to neither."""
        hit = np.isin(digests, self._everywhere)
        val = np.zeros(len(digests), bool)
        for i in np.flatnonzero(hit):
            digest = int(digests[i])
            if digest in self._left:
                self._left.remove(digest)
                val[i] = True
        return ~hit, val
