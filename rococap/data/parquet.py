"""Reads shards in Parquet: checks their columns, and yields their rows without the pictures.

Knows no layout: it is given the paths of the files.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rococap.data.places import STANDARD, Columns, Ids, Sample, Shard, concepts, file_name, listed, row_id
from rococap.errors import DatasetError

ROWS_PER_TEXT_BATCH = 8192
AGAIN = "Write the file again."


def shards(root: Path, paths: Sequence[str], split: str, columns: Columns = STANDARD) -> list[Shard]:
    """Describes a split's files, given in data set order. Raises DatasetError if one of them is unusable.

    Reads their footers and, if there is no column of ids, the pictures' file names.
    """
    facts, first_row = [], 0
    with_ids: list[str] = []
    without_ids: list[str] = []
    for path in paths:
        with open_parquet(root / path, columns) as file:
            rows, row_groups = file.metadata.num_rows, file.num_row_groups
            (with_ids if columns.name("image_id") in file.schema_arrow.names else without_ids).append(path)
        facts.append((path, split, rows, row_groups, (root / path).stat().st_size, _footer_digest(root / path)))
    if with_ids and without_ids:
        raise DatasetError(
            f"{root / without_ids[0]} lacks {listed([columns.name('image_id')])}, which {with_ids[0]} has: "
            "write it with ids, or all files of the split without."
        )
    ids: Ids = "column" if with_ids else _named_by(root, paths, columns)
    found = []
    for fact in facts:
        found.append(Shard(*fact, first_row=first_row, ids=ids))
        first_row += fact[2]
    return found


def _named_by(root: Path, paths: Sequence[str], columns: Columns) -> Ids:
    """What identifies rows without ids: their pictures' file names if all have one and all differ, else numbers."""
    known: set[str] = set()
    for path in paths:
        with open_parquet(root / path, columns) as file:
            if not _has_paths(file.schema_arrow.field(columns.name("image")).type):
                return "row"
            for names in _file_names(file, root / path, columns):
                if not all(names) or len(set(names)) < len(names) or not known.isdisjoint(names):
                    return "row"
                known.update(names)
    return "file"


def _has_paths(image: Any) -> bool:
    return bool(pa.types.is_struct(image) and image.get_field_index("path") >= 0 and _is_text(image.field("path").type))


def _file_names(file: Any, path: Path, columns: Columns) -> Iterator[list[str]]:
    name = columns.name("image")
    for batch in batches(file, path, [f"{name}.path"], ROWS_PER_TEXT_BATCH):
        yield [file_name(picture_path) for picture_path in batch.column(name).flatten()[0].to_pylist()]


def _footer_digest(path: Path) -> str:
    with path.open("rb") as file:
        # A Parquet file ends with its footer, four bytes that hold the footer's length, and PAR1.
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()


def open_parquet(path: Path, columns: Columns = STANDARD) -> Any:
    """Opens a Parquet file, which the caller has to close.

    Raises DatasetError if it is missing or damaged, or lacks a column, or if a column's type is not supported.
    """
    try:
        # With pre_buffer, a whole row group is held in memory: 410 MB were measured instead of 10.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is gone: restore it or download it again.") from error
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, error) from error
    _check_columns(path, file.schema_arrow, columns)
    return file


def _broken(path: Path, error: Exception) -> DatasetError:
    if isinstance(error, OSError) and error.errno:
        return DatasetError(
            f"{path} cannot be read ({os.strerror(error.errno)}): check the disk and the file's permissions."
        )
    return DatasetError(f"{path} is not a Parquet file, or it is truncated or damaged: download it again.")


def batches(file: Any, path: Path, columns: list[str], rows: int, row_groups: list[int] | None = None) -> Iterator[Any]:
    """Yields record batches of up to `rows` rows. Raises DatasetError, naming `path`, if the file is damaged."""
    try:
        yield from file.iter_batches(batch_size=rows, row_groups=row_groups, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, error) from error


# ---- checking columns


def _check_columns(path: Path, schema: Any, columns: Columns) -> None:
    counts = Counter(schema.names)
    named = columns.given()
    wanted = [columns.name(key) for key in ("image", "image_id", "caption", "cui")]
    if missing := [name for name in dict.fromkeys([wanted[0], *named.values()]) if name not in counts]:
        raise DatasetError(
            f"{path} lacks {listed(missing)}; it has {listed(list(counts))}. "
            "Say what they are called, for example --columns image=IMG,image_id=ID,caption=TEXT,cui=CONCEPTS"
        )
    if repeated := [name for name in wanted if counts[name] > 1]:
        raise DatasetError(
            f"{path} has the column {repeated[0]} {counts[repeated[0]]} times: rename or drop all but one."
        )
    for name, check in zip(wanted, (_image, _image_id, _caption, _cui), strict=True):
        if name in counts and (complaint := check(name, schema.field(name).type)):
            raise DatasetError(f"{path}: the column {complaint}")


def _image(name: str, kind: Any) -> str:
    if _is_binary(kind):
        return ""
    if not pa.types.is_struct(kind):
        return _not_binary(name, kind, "a struct with bytes")
    fields = Counter(kind.field(n).name for n in range(kind.num_fields))
    if repeated := [field for field in ("bytes", "path") if fields[field] > 1]:
        return f"{name} has the field {repeated[0]} {fields[repeated[0]]} times: rename or drop all but one."
    data = kind.field("bytes").type if fields["bytes"] else pa.null()
    if _is_binary(data) or (pa.types.is_null(data) and _has_paths(kind)):
        return ""
    if not fields["bytes"]:
        return f"{name} is {kind}, not a struct with bytes. {AGAIN}"
    return _not_binary(f"{name}.bytes", data, "binary")


def _not_binary(name: str, kind: Any, wanted: str) -> str:
    if _is_text(kind):
        cast = "If it holds base64, decode it (base64.b64decode) to pa.binary()"
        cast += "; if it holds paths, make it the field path of a struct." if wanted != "binary" else "."
        return f"{name} is {kind}, not {wanted}. {cast}"
    if _is_list_of(kind, pa.types.is_integer):
        return f"{name} is {kind}, not {wanted}. Convert each list with bytes() to pa.binary()."
    return f"{name} is {kind}, not {wanted}. {AGAIN}"


def _image_id(name: str, kind: Any) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return "" if _is_text(kind) or pa.types.is_integer(kind) else f"{name} is {kind}, not text. {AGAIN}"


def _caption(name: str, kind: Any) -> str:
    return "" if _is_text(kind) or pa.types.is_null(kind) else f"{name} is {kind}, not text. {AGAIN}"


def _cui(name: str, kind: Any) -> str:
    is_right = _is_text(kind) or pa.types.is_null(kind) or _is_list_of(kind, lambda of: _is_text(of) or of == pa.null())
    return "" if is_right else f"{name} is {kind}, not a list of text. {AGAIN}"


def _is_binary(kind: Any) -> bool:
    of = pa.types
    return any(is_kind(kind) for is_kind in (of.is_binary, of.is_large_binary, of.is_binary_view))


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list_of(kind: Any, is_kind: Any) -> bool:
    of = pa.types
    is_list = of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind) or of.is_list_view(kind)
    return bool(is_list and is_kind(kind.value_type))


# ---- rows


def samples(root: Path, shard: Shard, columns: Columns = STANDARD) -> Iterator[Sample]:
    """Yields the rows of a shard in order, without pictures. Raises DatasetError if it cannot be read."""
    path = root / shard.path
    with open_parquet(path, columns) as file:
        wanted = [columns.name(key) for key in ("caption", "cui")]
        read = [name for name in wanted if name in file.schema_arrow.names]
        if shard.ids != "row":
            read.append(columns.name("image_id") if shard.ids == "column" else f"{columns.name('image')}.path")
        places, rows = _places(file.metadata), count(shard.first_row)
        if not read:
            # There is nothing to read but the number of rows, which is in the footer.
            for place, row in zip(places, rows, strict=False):
                yield Sample(row_id(shard.split, row), "", (), *place)
            return
        for batch in batches(file, path, read, ROWS_PER_TEXT_BATCH):
            ids = _ids(path, batch, shard, columns, rows)
            captions, cuis = (
                batch.column(name).to_pylist() if name in batch.schema.names else repeat(None) for name in wanted
            )
            # `places` comes last: when an earlier iterator ends, zip must not have taken another place already.
            for image_id, caption, cui, place in zip(ids, captions, cuis, places, strict=False):
                yield Sample(image_id, caption or "", _concepts(cui), *place)


def image_ids(root: Path, shard: Shard, columns: Columns = STANDARD) -> Iterator[str]:
    """Yields the ids that a shard holds, none if its rows are only numbered. Raises DatasetError like `samples`."""
    path = root / shard.path
    if shard.ids == "row":  # the ids are ours, not the file's
        return
    with open_parquet(path, columns) as file:
        column = columns.name("image_id") if shard.ids == "column" else f"{columns.name('image')}.path"
        for batch in batches(file, path, [column], ROWS_PER_TEXT_BATCH):
            yield from _ids(path, batch, shard, columns, count())


def _ids(path: Path, batch: Any, shard: Shard, columns: Columns, rows: Iterator[int]) -> list[str]:
    if shard.ids == "row":
        return [row_id(shard.split, next(rows)) for _ in range(batch.num_rows)]
    if shard.ids == "file":
        return [file_name(picture) for picture in batch.column(columns.name("image")).flatten()[0].to_pylist()]
    name = columns.name("image_id")
    ids = batch.column(name)
    if ids.null_count:
        raise DatasetError(f"{path}: {ids.null_count} rows have no {name}. {AGAIN}")
    return [image_id if isinstance(image_id, str) else str(image_id) for image_id in ids.to_pylist()]


def _concepts(cui: Iterable[str | None] | str | None) -> tuple[str, ...]:
    return concepts([concept.strip() for concept in cui.split(";")] if isinstance(cui, str) else cui)


def _places(metadata: Any) -> Iterator[tuple[int, int]]:
    for group in range(metadata.num_row_groups):
        for row in range(metadata.row_group(group).num_rows):
            yield group, row
