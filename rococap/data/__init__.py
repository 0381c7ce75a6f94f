"""Data sets: their rows, the places of their pictures, and pictures made upright RGB. Knows no database or model.

Two layouts are read. Parquet, as on the hub: `data/{split}-000NN-of-000MM.parquet` and what else `layout` knows, with a
column of pictures and, if there, ids, captions and concepts. And folders of pictures, as on Zenodo and in ImageCLEF:
`{split}/{ID}.jpg`, `{split}_captions.csv` and, if there, `{split}_concepts_manual.csv` or `{split}_concepts.csv`.
"""

from rococap.data.hub import cached
from rococap.data.layout import SPLITS
from rococap.data.places import HUB_ID, STANDARD, Columns, Dataset, Place, Sample, Shard, at_revision, parse_name
from rococap.data.reader import PictureReader

__all__ = [
    "HUB_ID",
    "SPLITS",
    "STANDARD",
    "Columns",
    "Dataset",
    "PictureReader",
    "Place",
    "Sample",
    "Shard",
    "at_revision",
    "cached",
    "parse_name",
]
