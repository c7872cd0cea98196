"""Data sets and small pretrained backbones by name, without a hub.

``load`` tries four resolvers in order: what an installed library embeds, a file inside an installed package,
the folder that ``MEMSPAN_DATA`` names, the official download. The network is used by ``get`` and by
``allow_download=True`` only. Every set says where it came from and what its content's checksum is.

Example:
    >>> from memspan import data
    >>> digits = data.load("digits", data.ImageSet)
    >>> digits.x_train.shape, digits.licence
    ((1438, 8, 8), 'CC BY 4.0')
"""

from memspan.data import features
from memspan.data.backbones import Backbone, backbone, known_backbones
from memspan.data.cache import cache_folder
from memspan.data.catalog import Entry, Row, catalog, rows
from memspan.data.download import DownloadFailed
from memspan.data.embed import (
    Embedder,
    HashingEmbedder,
    MiniLMEmbedder,
    SentenceTransformerEmbedder,
    StaticEmbedder,
)
from memspan.data.loading import get, load, load_first
from memspan.data.own import read
from memspan.data.resolvers import DataNotFound
from memspan.data.sets import AnySet, ArraySet, FileSet, ImageSet, TableSet, TextSet
from memspan.data.streams import ClassTask, class_tasks
from memspan.data.tables import read_chunks
from memspan.data.text import BPETokenizer, CharTokenizer, train_bpe
from memspan.data.volumes import Volume, read_volume, write_volume

__all__ = [
    "AnySet",
    "ArraySet",
    "BPETokenizer",
    "Backbone",
    "CharTokenizer",
    "ClassTask",
    "DataNotFound",
    "DownloadFailed",
    "Embedder",
    "Entry",
    "FileSet",
    "HashingEmbedder",
    "ImageSet",
    "MiniLMEmbedder",
    "Row",
    "SentenceTransformerEmbedder",
    "StaticEmbedder",
    "TableSet",
    "TextSet",
    "Volume",
    "backbone",
    "cache_folder",
    "catalog",
    "class_tasks",
    "features",
    "get",
    "known_backbones",
    "load",
    "load_first",
    "read",
    "read_chunks",
    "read_volume",
    "rows",
    "train_bpe",
    "write_volume",
]
