"""Finds a data set and its rows, in whichever layout it has. Never reads a picture."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rococap.data import folders, hub, layout, parquet
from rococap.data.folders import infix_of
from rococap.data.layout import Layout
from rococap.data.places import HUB_ID, STANDARD, Columns, Dataset, Sample, Shard, full_name, parse_name
from rococap.errors import DatasetError


def locate(name: str, splits: Sequence[str], revision: str | None = None, config: str = "") -> Dataset:
    """A folder as it is; of a hub data set the Parquet files of `splits`, downloaded where they are not cached.

    The configuration may be told apart or in the name, after a colon.
    """
    place, config = _place_and_config(name, config)
    folder = Path(os.path.expanduser(place))
    if folder.is_dir():
        if revision is not None:
            raise DatasetError(f"{place} is a folder, and folders have no revisions: leave the revision out.")
        root = folder.resolve()
        return Dataset(full_name(str(root), config), root, "", config)
    if folder.exists():
        raise DatasetError(f"{place} is a file: give the folder that holds it.")
    if not HUB_ID.fullmatch(place):
        raise DatasetError(f"There is no folder {place}: check the path, or name a data set of the hub as owner/name.")
    return hub.download(place, config, splits, revision)


def name_of(name: str, config: str) -> str:
    """What a data set of the hub is called that is asked for so."""
    return full_name(*_place_and_config(name, config))


def _place_and_config(name: str, config: str) -> tuple[str, str]:
    place, told = parse_name(name)
    if config and told not in ("", config):
        raise DatasetError(f"{name} names the configuration {told}, and --config {config}: leave one of them out.")
    config = config or told
    return place, "" if config == layout.DEFAULT else config


def find_shards(root: Path, split: str, config: str = "", columns: Columns = STANDARD) -> list[Shard]:
    """The files of a split, in data set order."""
    if not root.is_dir():
        raise DatasetError(f"There is no folder {root}: check the path.")
    found = layout.local(root, str(root))
    paths = found.files_of(split, config)
    if not paths:
        raise _no_such_split(found, root, split, config)
    if paths[0].lower().endswith(layout.PARQUET):
        return parquet.shards(root, paths, split, columns)
    return [folders.shard(root, path, split, columns) for path in paths]


def samples(root: Path, shard: Shard, columns: Columns = STANDARD) -> Iterator[Sample]:
    """The rows of a shard in their order, read as they are asked for."""
    if shard.path.lower().endswith(layout.CAPTIONS):
        return folders.samples(root, shard, columns)
    return parquet.samples(root, shard, columns)


def image_ids(root: Path, shard: Shard, columns: Columns = STANDARD) -> Iterator[str]:
    """The ids of a shard's rows, without reading what else there is of them."""
    if shard.path.lower().endswith(layout.CAPTIONS):
        return (sample.image_id for sample in folders.samples(root, shard, columns))
    return parquet.image_ids(root, shard, columns)


def _no_such_split(found: Layout, root: Path, split: str, config: str) -> DatasetError:
    there, hints = ", ".join(found.splits(config)), found.hints(split)
    holds = f"It holds: {there}. Choose one of these." if there else "It holds no split: choose another folder."
    return DatasetError(
        f"{root} holds no split {split!r}, neither {split}-00000-of-000NN.parquet "
        f"nor {infix_of(split)}_captions.csv. {hints.strip() if hints and not there else holds + hints}"
    )
