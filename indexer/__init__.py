"""From image collections to searchable snapshots: sources, builds, snapshots, publication, search.

Imports perception alone. Knows nothing of HTTP, and no environment variable. `indexer.snapshot` holds the value that
is searched, `indexer.store` what is on disk, `indexer.catalog` the record of what changes while a service runs, and
`indexer.live` what such a service holds.
"""
