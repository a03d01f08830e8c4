"""Implementations of `indexer.index.VectorIndex`, one class a file; `tests/contracts` holds them to one contract."""
