"""The catalogue: the system of record of what changes while the service runs.

Owns the log of changes and decisions, and what is derived from it: states of collections, reviews, jobs, deliveries.
"""

CATALOG_FILE = "catalog.sqlite3"  # of SQLite, in the folder of the collections
