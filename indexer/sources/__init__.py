"""Where images come from: a folder, a CSV manifest, tar shards. Each streams, in an order that never changes."""

from indexer.sources.folder import FolderSource
from indexer.sources.item import Skipped, Source, SourceItem
from indexer.sources.manifest import ManifestSource
from indexer.sources.tar import TarSource

__all__ = ["FolderSource", "ManifestSource", "Skipped", "Source", "SourceItem", "TarSource"]
