"""Finds a data set and its rows, whichever layout it has. Never reads a picture."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rococap.data import folders, hub, layout, parquet
from rococap.data.folders import infix_of
from rococap.data.layout import Layout
from rococap.data.places import HUB_ID, STANDARD, Columns, Dataset, Sample, Shard, full_name, parse_name
from rococap.errors import DatasetError


def locate(name: str, splits: Sequence[str], revision: str | None = None, config: str = "") -> Dataset:
    """Returns a folder as it is, or a hub data set with the Parquet files of `splits`, downloaded unless cached.

    The configuration is given as `config` or in the name, after a colon. Raises DatasetError if there is no such data
    set, if the two configurations differ, or if the download fails.
    """
    source, config = _source_and_config(name, config)
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        if revision is not None:
            raise DatasetError(f"{source} is a folder, and folders have no revisions: leave the revision out.")
        root = folder.resolve()
        return Dataset(full_name(str(root), config), root, "", config)
    if folder.exists():
        raise DatasetError(f"{source} is a file: give the folder that holds it.")
    if not HUB_ID.fullmatch(source):
        raise DatasetError(f"There is no folder {source}: check the path, or name a data set on the hub as owner/name.")
    return hub.download(source, config, splits, revision)


def name_of(name: str, config: str) -> str:
    """Returns a data set's name with its configuration after a colon, unless that is the default."""
    return full_name(*_source_and_config(name, config))


def _source_and_config(name: str, config: str) -> tuple[str, str]:
    source, in_name = parse_name(name)
    if config and in_name not in ("", config):
        raise DatasetError(
            f"{name} names the configuration {in_name}, but --config is {config}: leave one of them out."
        )
    config = config or in_name
    return source, "" if config == layout.DEFAULT else config


def find_shards(root: Path, split: str, config: str = "", columns: Columns = STANDARD) -> list[Shard]:
    """Lists the files of a split, in data set order. Raises DatasetError if it is absent or a file is unusable."""
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
    """Yields the rows of a shard in order, reading lazily. Raises DatasetError if the shard cannot be read."""
    if shard.path.lower().endswith(layout.CAPTIONS):
        return folders.samples(root, shard, columns)
    return parquet.samples(root, shard, columns)


def image_ids(root: Path, shard: Shard, columns: Columns = STANDARD) -> Iterator[str]:
    """Yields the ids stored in a shard, none if its rows are only numbered. Reads no other column of a Parquet file.

    Raises DatasetError if the shard cannot be read.
    """
    if shard.path.lower().endswith(layout.CAPTIONS):
        return (sample.image_id for sample in folders.samples(root, shard, columns))
    return parquet.image_ids(root, shard, columns)


def _no_such_split(found: Layout, root: Path, split: str, config: str) -> DatasetError:
    splits, hints = ", ".join(found.splits(config)), found.hints(split)
    advice = f"It has: {splits}. Choose one of these." if splits else "It has no split at all: choose another folder."
    return DatasetError(
        f"{root} has no split {split!r}: there is neither {split}-00000-of-000NN.parquet "
        f"nor {infix_of(split)}_captions.csv. {hints.strip() if hints and not splits else advice + hints}"
    )
