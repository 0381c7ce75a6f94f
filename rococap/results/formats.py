"""Captions as CSV, Parquet or JSON Lines."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter, WriteOptions

from rococap.results.snapshot import COLUMNS

FORMATS = ("csv", "parquet", "jsonl")
FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
"""What a spreadsheet may run: OWASP's list with its full-width signs, these also behind white space, which some strip.
The apostrophes make it invertible: a cell matches with one more in front exactly if it does without.
"""
SCHEMA = pa.schema([(name, pa.float64() if name == "processing_time_sec" else pa.string()) for name in COLUMNS])


def disarmed(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def armed(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and FORMULA.match(cell, 1) else cell


def write_frames(
    frames: Iterator[pd.DataFrame], path: Path, suffix: str, schema: pa.Schema = SCHEMA, *, mark: bool = False
) -> int:
    """Writes the format that the suffix names, with `mark` a CSV with a byte-order mark; returns how many rows."""
    match suffix:
        case ".csv":
            return write_csv(frames, path, schema, **({"mark": True} if mark else {}))
        case ".jsonl":
            return _write_jsonl(frames, path)
        case ".parquet":
            return _write_parquet(frames, path, schema)
    raise ValueError(f"the file's name must end in one of {', '.join(FORMATS)}, not {suffix}")


def write_csv(frames: Iterator[pd.DataFrame], path: Path, schema: pa.Schema = SCHEMA, *, mark: bool = False) -> int:
    """RFC 4180 with \\n and a plain header. Arrow quotes every text, where the csv module before Python 3.13 leaves a
    bare \\r unquoted, and takes half the time of pandas. Excel reads a file that has no `mark` in the machine's own
    code page, and so `é` as `Ã©`.
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
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False)


_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ufeff]+")


def fold(text: str) -> str:
    """White space and control characters, \\r, \\v, \\f and U+2028 among them, become one space: tools that read a
    caption a line would else see two, and every later pair would shift.
    """
    # What is printable has no white space but plain spaces, and most texts are.
    return " ".join((text if text.isprintable() else _BLANK.sub(" ", text)).split())
