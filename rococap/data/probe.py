"""Opens a few pictures of a split before it is registered: if none can be opened, all of them would fail later.

Writes nothing, and knows no database.
"""

from collections.abc import Iterator, Sequence

from rococap.data import datasets, layout, parquet
from rococap.data.images import open_picture
from rococap.data.places import Dataset, Place, Shard
from rococap.data.reader import PictureReader
from rococap.errors import DatasetError, PictureError
from rococap.recipe import Recipe

FEW, MANY = 3, 20
"""How many pictures are tried first, and how many if none of those can be opened."""


def require_pictures(dataset: Dataset, split: str, shards: Sequence[Shard], recipe: Recipe) -> None:
    """Raises DatasetError, quoting the first reason, if none of some pictures spread over the split can be opened."""
    total = sum(shard.rows for shard in shards)
    tried: list[str] = []
    with PictureReader(dataset.root) as reader:
        for n in (FEW, MANY) if total else ():
            tried = []
            for place, row in _places(dataset, shards, _spread(total, n)):
                if (complaint := _complaint(reader, place, recipe)) is None:
                    return
                tried.append(f"row {row} of {place.shard}: {complaint}")
    if tried:
        raise DatasetError(
            f"Nothing was registered: none of the {len(tried)} pictures tried from the split {split!r} can be opened. "
            f"The first, {' '.join(tried[0].split())} If the pictures are elsewhere, name their column: "
            "--columns image=NAME"
        )


def _complaint(reader: PictureReader, place: Place, recipe: Recipe) -> str | None:
    try:
        open_picture(reader.look(place), recipe.frame)
    except PictureError as error:
        return str(error)
    return None


def _spread(total: int, n: int) -> list[int]:
    """The numbers of up to `n` rows, spread evenly over `total`."""
    return sorted({(2 * part + 1) * total // (2 * n) for part in range(n)})


def _places(dataset: Dataset, shards: Sequence[Shard], rows: Sequence[int]) -> Iterator[tuple[Place, int]]:
    """Yields the places of some rows of a split, and the numbers of these rows in their shards."""
    first = 0
    for shard in shards:
        inside = [row - first for row in rows if first <= row < first + shard.rows]
        first += shard.rows
        if inside:
            is_csv = shard.path.lower().endswith(layout.CAPTIONS)
            yield from (_in_csv if is_csv else _in_parquet)(dataset, shard, inside)


def _in_csv(dataset: Dataset, shard: Shard, rows: Sequence[int]) -> Iterator[tuple[Place, int]]:
    wanted = set(rows)
    for row, sample in enumerate(datasets.samples(dataset.root, shard, dataset.columns)):
        if row in wanted:
            yield Place(shard.path, shard.split, 0, row, sample.image_id, dataset.columns), row


def _in_parquet(dataset: Dataset, shard: Shard, rows: Sequence[int]) -> Iterator[tuple[Place, int]]:
    """Yields places without ids, since nothing compares ids yet."""
    with parquet.open_parquet(dataset.root / shard.path, dataset.columns) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    for row in rows:
        group, left = 0, row
        while left >= sizes[group]:
            left -= sizes[group]
            group += 1
        yield Place(shard.path, shard.split, group, left, "", dataset.columns), row
