"""Places: where the console shows a collection and an exemplar, whatever characters their names have."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

POOLS_PAGE = "/console/pools"
# Browsers take these for steps through the path, encoded or not; so they travel in the query.
_STEPS = (".", "..")


def collection_place(collection: str) -> str:
    """Path of the page of a collection."""
    return f"{POOLS_PAGE}/{quote(collection, safe='')}"


def exemplar_place(collection: str, id: str) -> str:
    """Path of the page of an exemplar; a query with it, where the id cannot be a part of a path."""
    quoted = quote(id, safe="")
    # No pattern of a path matches a line break.
    in_path = id not in _STEPS and "\n" not in id and "\r" not in id
    return collection_place(collection) + (f"/{quoted}" if in_path else f"?id={quoted}")


LINKS: Mapping[str, Any] = MappingProxyType({"collection_place": collection_place, "exemplar_place": exemplar_place})
"""For templates, which put them together with `page(visit, ..., **LINKS)`."""
