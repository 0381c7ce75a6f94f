"""Writes captions as CSV, Parquet or JSON Lines. Frames in, files out: knows neither runs nor the database."""

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter, WriteOptions

from rococap.results.snapshot import COLUMNS

FORMATS = ("csv", "parquet", "jsonl")
FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
"""Texts that a spreadsheet may execute: the characters in OWASP's list for CSV injection, with their full-width forms,
also after white space, which some programs strip. Matching any number of apostrophes makes `disarmed` invertible: a
cell matches with one more apostrophe in front if and only if it matches without.
"""
SCHEMA = pa.schema([(name, pa.float64() if name == "processing_time_sec" else pa.string()) for name in COLUMNS])


def schema_with(texts: Iterable[str]) -> pa.Schema:
    """SCHEMA with further columns of text."""
    return pa.schema([*SCHEMA, *((name, pa.string()) for name in texts)])


def disarmed(cell: Any) -> Any:
    """The cell with an apostrophe in front if a spreadsheet would execute it; any other cell is returned unchanged."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def armed(cell: Any) -> Any:
    """The inverse of `disarmed`."""
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and FORMULA.match(cell, 1) else cell


def write_frames(
    frames: Iterator[pd.DataFrame], path: Path, suffix: str, schema: pa.Schema = SCHEMA, *, mark: bool = False
) -> int:
    """Writes frames with the columns of `schema` in the format that `suffix` names; returns the number of rows.

    `mark` puts a byte-order mark at the start of a CSV. Raises ValueError for any other suffix.
    """
    match suffix:
        case ".csv":
            return write_csv(frames, path, schema, **({"mark": True} if mark else {}))
        case ".jsonl":
            return _write_jsonl(frames, path)
        case ".parquet":
            return _write_parquet(frames, path, schema)
    raise ValueError(f"the file name must end in one of {', '.join(FORMATS)}, not {suffix}")


def write_csv(frames: Iterator[pd.DataFrame], path: Path, schema: pa.Schema = SCHEMA, *, mark: bool = False) -> int:
    """Writes RFC 4180 CSV with \\n as line ending and an unquoted header; returns the number of rows.

    Arrow quotes every text, whereas Python's csv module before 3.13 leaves a bare \\r unquoted, and it takes half as
    long as pandas. `mark` writes a byte-order mark: without one, Excel decodes the file in the machine's own code page
    and shows `é` as `Ã©`.
    """
    rows = 0
    with path.open("wb") as file:
        file.write(codecs.BOM_UTF8 if mark else b"")
        file.write(",".join(schema.names).encode() + b"\n")
        with CSVWriter(file, schema, write_options=WriteOptions(include_header=False)) as writer:
            for frame in frames:
                writer.write_table(table_of(frame, schema))
                rows += len(frame)
    return rows


def _write_jsonl(frames: Iterator[pd.DataFrame], path: Path) -> int:
    rows = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        for frame in frames:
            file.write(frame.to_json(orient="records", lines=True, force_ascii=False))
            rows += len(frame)
    return rows


def _write_parquet(frames: Iterator[pd.DataFrame], path: Path, schema: pa.Schema) -> int:
    rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for frame in frames:
            writer.write_table(table_of(frame, schema))
            rows += len(frame)
    return rows


def table_of(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """The frame as an Arrow table of this schema, without the frame's index."""
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False)


_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ufeff]+")


def fold(text: str) -> str:
    """The text in one line: each run of white space or control characters, including \\r, \\v, \\f and U+2028, becomes
    one space.

    Tools that read one caption per line would otherwise see two, and misalign every later caption and reference.
    """
    # A printable text, as most are, holds no white space other than plain spaces.
    return " ".join((text if text.isprintable() else _BLANK.sub(" ", text)).split())
