"""Keep-lists: exactly round(keep * N) samples, from a stream too long to sort or to hold.

`strategies` is the registry and explains how to add a strategy, `keep_list` has `select`. The
strategies that need scores alone are in `deterministic`, `randomized` and `band`, those that also
need embeddings in `d2`, `infomax`, `coverage` and `typical`. `radix_select` finds where each list
ends.
"""

from __future__ import annotations

from raypipe.selection.base import Parts, SelectionOptions
from raypipe.selection.hashing import IdSet, hash64, id_hash
from raypipe.selection.keep_list import Selection, select
from raypipe.selection.outside import KeepStrategy
from raypipe.selection.quotas import even_quotas, proportional_quotas
from raypipe.selection.radix_select import (
    ALWAYS,
    FREE,
    NEVER,
    Chunk,
    Chunks,
    EmbeddedChunks,
    order_key,
)
from raypipe.selection.strategies import (
    STRATEGIES,
    find_strategy,
    needs_classes,
    needs_embeddings,
    needs_loss,
    needs_margin,
)

__all__ = [
    "ALWAYS",
    "FREE",
    "NEVER",
    "STRATEGIES",
    "Chunk",
    "Chunks",
    "EmbeddedChunks",
    "IdSet",
    "KeepStrategy",
    "Parts",
    "Selection",
    "SelectionOptions",
    "even_quotas",
    "find_strategy",
    "hash64",
    "id_hash",
    "needs_classes",
    "needs_embeddings",
    "needs_loss",
    "needs_margin",
    "order_key",
    "proportional_quotas",
    "select",
]
