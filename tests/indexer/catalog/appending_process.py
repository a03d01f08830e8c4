"""A process of its own that appends and says what was acknowledged; killed by a test, or run beside another one.

Usage: appending_process.py URL ENTRIES
"""

import sys
from contextlib import closing

from indexer.catalog import chain
from indexer.catalog.chain import CHANGES, Draft
from indexer.catalog.database import Database


def main(url: str, entries: int) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    with closing(Database.open(url)) as database:
        for i in range(entries):
            with database.writing() as connection:
                made = chain.append(connection, CHANGES, [Draft("exemplar.add", "process", subject=f"x{i}")] * 2)
            print(made[-1].seq, made[-1].hash, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
