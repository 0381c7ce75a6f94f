"""Data sets: finds their rows, locates and reads their pictures, and decodes them to upright RGB.

Knows no database and no model. Two layouts are supported:

- Parquet, as on the hub: `data/{split}-000NN-of-000MM.parquet` and the other names that `layout` recognises, with a
  column of pictures and, optionally, columns of ids, captions and concepts;
- folders of pictures, as on Zenodo and in ImageCLEF: `{split}/{ID}.jpg`, `{split}_captions.csv` and, optionally,
  `{split}_concepts_manual.csv` or `{split}_concepts.csv`.
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
