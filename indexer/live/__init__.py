"""The present state of a collection while it is edited: a snapshot on disk with the records of the catalogue on top.

`indexer.live.view` is what is searched, immutable as a snapshot is; `indexer.live.collection` swaps one for the next.
"""
