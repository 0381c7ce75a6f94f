"""Captions -> what other tools take: a submission to ImageCLEF, a data set of the hub, files to train on.

Read as an export is: below one time, in short transactions. A file or folder appears whole or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
from sqlalchemy import Engine as Database

from rococap import __version__, datasets, queue
from rococap.datasets import PictureReader, Place
from rococap.db import execute, transaction
from rococap.enqueue import LONGEST_ID
from rococap.errors import PictureError, RococapError, RunError
from rococap.export import (
    MANIFEST,
    PAGE,
    SCHEMA,
    SELECTED,
    IncompleteError,
    Progress,
    Read,
    cannot_write,
    check_complete,
    done_pages,
    finished_until,
    frame_of,
    fsync,
    manifest_of,
    manifest_path,
    read_json,
    replacing,
    sha256_of,
    short_reads,
    stripped,
    write_frames,
    write_json,
)
from rococap.images import as_file
from rococap.metrics import fold
from rococap.queue import Counts, Run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# --- ImageCLEF -------------------------------------------------------------------------------------------------

_SUBMISSION = pa.schema([("ID", pa.string()), ("Caption", pa.string())])


@dataclass(slots=True)
class Submission:
    """What was submitted: rows, pictures among them that have no caption, and cells that are empty, also therefore."""

    path: Path
    rows: int = 0
    missing: int = 0
    empty: int = 0


def submit(
    database: Database,
    run: Run,
    split: str,
    path: Path,
    *,
    allow_missing: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Submission:
    """Writes `ID,Caption` for every picture that the data set has of the split, in its order, and a manifest.

    Raises IncompleteError if pictures have no caption, unless that is allowed; RunError if the run has nothing of the
    split; RococapError for IDs that no submission can hold, or if the file cannot be written. An older file then stays.
    """
    with transaction(database) as conn:
        queue.counts_of(conn, run, [split])
        images = execute(
            conn,
            "SELECT id, image_id FROM images WHERE dataset_id = ? AND split = ? ORDER BY id",
            (run.dataset_id, split),
        ).fetchall()
        cutoff = finished_until(conn, [run], [split])
    ids = {id: _submitted_id(image_id) for id, image_id in images}
    if len(set(ids.values())) < len(ids):
        raise RococapError(f"IDs of {split} differ by white space alone, which ImageCLEF ignores: mend the data set.")
    submission = Submission(path)
    with replacing(path) as partial, short_reads(database) as read:
        pages = done_pages(read, run, split, cutoff, "j.image_id, c.text", strip_reasoning=strip_reasoning)
        captions = chain.from_iterable(pages)
        write_frames(_submitted(ids, captions, submission, split, progress), partial, ".csv", _SUBMISSION)
        if submission.missing and not allow_missing:
            raise _incomplete(run, split, submission)
        digest = sha256_of(partial)
        manifest_path(path).unlink(missing_ok=True)
    told = {name: getattr(submission, name) for name in ("rows", "missing", "empty")}
    about = {"format": "imageclef", "split": split, "file": path.name, **told, "sha256": digest}
    write_json(manifest_path(path), manifest_of(run) | about | stripped(strip_reasoning))
    return submission


def _submitted_id(image_id: str) -> str:
    """Stripped, as the checker strips those of its own list. It splits rows at line breaks and at commas, before it
    looks at quotes.
    """
    stripped = image_id.strip()
    if "," in stripped or stripped.splitlines() != [stripped]:
        raise RococapError(
            f"The ID {image_id!r} cannot be submitted: ImageCLEF's are one line without commas. Use its own data set, "
            "or another --format."
        )
    return stripped


def _submitted(
    ids: dict[int, str], captions: Iterator[Sequence[Any]], told: Submission, split: str, progress: Progress
) -> Iterator[pd.DataFrame]:
    rows = _every_id(ids, captions)
    while page := list(islice(rows, PAGE)):
        texts = [fold(text or "") for _, text in page]
        told.rows += len(page)
        told.missing += sum(text is None for _, text in page)
        told.empty += texts.count("")
        yield pd.DataFrame({"ID": [image_id for image_id, _ in page], "Caption": texts}, dtype=object)
        progress(f"{split}: exporting", told.rows, len(ids))


def _every_id(ids: dict[int, str], captions: Iterator[Sequence[Any]]) -> Iterator[tuple[str, str | None]]:
    """Both come in the order of the key."""
    nothing = (0, None)
    captioned, text = next(captions, nothing)
    for id, image_id in ids.items():
        if id == captioned:
            yield image_id, text
            captioned, text = next(captions, nothing)
        else:
            yield image_id, None


def _incomplete(run: Run, split: str, submission: Submission) -> IncompleteError:
    return IncompleteError(
        f"{submission.missing} of {submission.rows} pictures of {split} have no caption, and ImageCLEF refuses a "
        f"submission that lacks an ID. Caption them: rococap enqueue --run {run.name} --split {split} …, then rococap "
        f"worker --run {run.name} (what failed: rococap failures); or give them an empty caption: --allow-missing."
    )


# --- Folders ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Written:
    """What a folder holds of a split. `missing` jobs are not done; `without_picture` were captioned and are left out,
    since their pictures can no longer be read: image_id -> why.
    """

    split: str
    captions: int
    missing: int
    flags: dict[str, int]
    without_picture: dict[str, str] = field(default_factory=dict)


def publish(
    database: Database,
    run: Run,
    splits: Sequence[str],
    folder: Path,
    format: str,
    *,
    require_complete: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> list[Written]:
    """Writes the done images of the splits, in data set order, to one folder of the format: hf, webdataset or kohya.

    Raises RunError if the run lacks a split or has no captions, IncompleteError if some are not done and all were
    required, DatasetError if pictures are asked for and the data set is away, RococapError if the folder cannot be
    written or holds what rococap did not write. An older folder then stays as it was.
    """
    with transaction(database) as conn:
        counts = [queue.counts_of(conn, run, [split])[0] for split in splits]
        cutoff = finished_until(conn, [run], splits)
    if not any(one.done for one in counts):
        raise RunError(
            f"Run {run.name!r} captioned nothing of {', '.join(splits)} yet: rococap worker --run {run.name}"
        )
    if require_complete:
        for one in counts:
            check_complete(run, one.split, one.done, one.total)
    source = _Source(database, run, cutoff, strip_reasoning, progress)
    folder = folder.resolve()
    new = {"run": run.name, "recipe_hash": run.recipe.hash, "format": format, "splits": splits}
    _check_replaceable(folder, new)
    # Once more at the end: an export may take hours, and somebody may work in the older folder meanwhile.
    with _replacing_folder(folder, lambda: _check_replaceable(folder, new)) as partial:
        written = _WRITERS[format](source, counts, partial)
        manifest = manifest_of(run) | {"format": format, "splits": {one.split: _told(one) for one in written}}
        manifest |= stripped(strip_reasoning)
        if format == "hf":
            (partial / "README.md").write_text(_card(run, written, manifest), encoding="utf-8")
        write_json(partial / MANIFEST, manifest | {"files": _listing(partial)})
        _give_one_time(partial)
    return written


@dataclass(frozen=True, slots=True)
class _Source:
    database: Database
    run: Run
    cutoff: int
    strip_reasoning: bool
    progress: Progress

    def pages(self, read: Read, split: str, columns: str) -> Iterator[Sequence[Sequence[Any]]]:
        return done_pages(read, self.run, split, self.cutoff, columns, strip_reasoning=self.strip_reasoning)


def _told(one: Written) -> dict[str, Any]:
    told = asdict(one)
    del told["split"]
    return told


@contextmanager
def _replacing_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """As `replacing` does for a file. An older folder steps aside for the moment of two renames, if the check, which
    comes right before, raises nothing.
    """
    partial, older = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        # A killed process may have had this pid: in containers they come again.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            fsync(path)
        fsync(partial)
        check()
        if folder.exists():
            shutil.rmtree(older, ignore_errors=True)
            folder.rename(older)
        try:
            partial.rename(folder)
        except OSError:
            if older.exists():
                older.rename(folder)
            raise
        fsync(folder.parent)
        shutil.rmtree(older, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(folder: Path, new: dict[str, Any]) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    there = read_json(folder / MANIFEST) if folder.is_dir() else None
    if not _is_ours(there):
        raise RococapError(f"{folder} is there, and rococap did not write it: name another place with --output.")
    if _is_another(there, new):
        raise RococapError(
            f"{folder} holds another export (run {there.get('run')}, format {there.get('format')}). Move it away, or "
            "write elsewhere with --output."
        )
    if others := _lost_splits(there, new):
        raise RococapError(
            f"{folder} also holds {', '.join(others)}, which would be lost: name every split that it is to hold "
            f"({_as_options(others, new)}), or write elsewhere with --output."
        )
    if there.get("files") != _listing(folder) or not _have_one_time(folder):
        raise RococapError(
            f"{folder} is not as rococap wrote it: files were added, taken away or edited. Move it away, or write "
            "elsewhere with --output."
        )


def _is_ours(there: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Other tools may have a file of that name."""
    return there is not None and isinstance(there.get("splits"), dict)


def _is_another(there: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(there.get(name) != new[name] for name in ("run", "recipe_hash", "format"))


def _lost_splits(there: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [split for split in there["splits"] if split not in new["splits"]]


def _as_options(others: Sequence[str], new: dict[str, Any]) -> str:
    return " ".join(f"--split {split}" for split in (*others, *new["splits"]))


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _listing(folder: Path) -> dict[str, Any]:
    """How many files, and a digest of names and sizes: a train split has more than a manifest should list."""
    files = [(path.relative_to(folder).as_posix(), path.lstat().st_size) for path in _files(folder)]
    files = sorted(file for file in files if file[0] != MANIFEST)
    return {"n": len(files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def _give_one_time(folder: Path) -> None:
    """All files of one export were last changed at one moment: whatever has another time was edited since. Unlike
    times in the manifest, this leaves the manifest of the same captions the same.
    """
    at = time.time_ns()
    # Some mounts let nobody set a time. There the folder is whole too, and the next export asks to move it away.
    with suppress(PermissionError):
        for path in _files(folder):
            os.utime(path, ns=(at, at))


def _have_one_time(folder: Path) -> bool:
    return len({path.lstat().st_mtime_ns for path in _files(folder)}) == 1


# --- A data set of the hub -------------------------------------------------------------------------------------

CARD = Path(__file__).with_name("card.md.jinja")
ROWS_PER_SHARD = 100_000
_TEXTS = pa.list_(pa.string())
_HF_SCHEMA = pa.schema([*SCHEMA, ("flags", _TEXTS), ("cui", _TEXTS)])
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


def _write_hub_layout(source: _Source, counts: Sequence[Counts], folder: Path) -> list[Written]:
    (folder / "data").mkdir()
    written = []
    for one in counts:
        rows = _write_shards(_hub_frames(source, one), folder / "data", one.split)
        written.append(Written(one.split, rows, one.total - rows, dict(one.flags)))
    return written


def _write_shards(frames: Iterator[pd.DataFrame], folder: Path, split: str) -> int:
    """How many shards there are stands in each one's name, and is known at the end."""
    rows, paths = 0, []
    for number, first in enumerate(frames):
        shard = chain([first], islice(frames, ROWS_PER_SHARD // PAGE - 1))
        paths.append(folder / f"{split}-{number:05}")
        rows += write_frames(shard, paths[-1], ".parquet", _HF_SCHEMA)
    for path in paths:
        path.rename(f"{path}-of-{len(paths):05}.parquet")
    return rows


def _hub_frames(source: _Source, counts: Counts) -> Iterator[pd.DataFrame]:
    done = 0
    with short_reads(source.database) as read:
        for rows in source.pages(read, counts.split, f"{SELECTED}, c.flags, i.cui"):
            done += len(rows)
            frame = frame_of(rows, source.run, counts.split)
            frame["flags"] = [_split(row[-2], ",") for row in rows]
            frame["cui"] = [_split(row[-1], ";") for row in rows]
            yield frame
            source.progress(f"{counts.split}: exporting", done, counts.done)


def _split(joined: str, separator: str) -> list[str]:
    return joined.split(separator) if joined else []


_OF_MODEL = ("engine", "dtype", "revision", "digest", "adapter", "rules", "accepted_rules")


def _card(run: Run, written: Sequence[Written], manifest: dict[str, Any]) -> str:
    """README.md: what made the captions, and what they are not for."""
    from jinja2 import Environment, StrictUndefined

    # Markdown with our own texts, names and a prompt: there is nothing to escape but fences.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"fenced": _fenced, "code": _code, "quoted": _quoted}
    rows = sum(one.captions for one in written)
    source, _ = datasets.parse_name(run.dataset)
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        title=f"Captions of radiology pictures by {Path(run.recipe.model).name}",
        source=source if datasets.HUB_ID.fullmatch(source) else None,
        size=next((size for most, size in _SIZES.items() if rows < most), "n>10M"),
        run=run,
        recipe=run.recipe,
        resolved=dict.fromkeys(_OF_MODEL, "") | (run.resolved or {}),
        written=written,
        is_qwen2_vl=_is_qwen2_vl(run.recipe.model),
        version=__version__,
        manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
    )


def _fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Within a line. Markdown takes one space away at either end, which keeps a backtick there from the fence."""
    fence = "`" * (_longest_ticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _quoted(text: str) -> str:
    """For YAML, which reads JSON's escapes of an emoji as two characters: so it stays as it is."""
    return json.dumps(text, ensure_ascii=False)


def _is_qwen2_vl(model: str) -> bool:
    if "qwen2-vl" in model.lower():
        return True
    config = Path(model) / "config.json"
    return config.is_file() and (read_json(config) or {}).get("model_type") == "qwen2_vl"


# --- Pushing it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pushed:
    url: str
    private: bool


def check_login() -> None:
    """Raises RococapError if the hub is away or does not know who is asking: before work is done for it."""
    from huggingface_hub import HfApi

    with _pushing("to the hub"):
        HfApi().whoami()


def push(folder: Path, repo: str, message: str) -> Pushed:
    """Uploads a folder of the format hf to a data set of the hub. A new one is made, and is private; of an old one,
    the shards that an earlier push left there are removed.

    Raises RococapError if the hub refuses or is away, or if the repository holds what rococap did not push, another
    run's captions, or a split that the folder lacks.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="rococap", library_version=__version__)
    with _pushing(repo, folder):
        repo = api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True).repo_id
        info = api.dataset_info(repo)
        names = {file.rfilename for file in info.siblings or []}
        if names - {".gitattributes"}:
            there = _pushed_manifest(api, repo, info.sha) if MANIFEST in names else None
            _check_pushable(repo, there, read_json(folder / MANIFEST) or {})
        api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            commit_message=message,
            delete_patterns="data/*.parquet",
        )
    return Pushed(f"{api.endpoint}/datasets/{repo}", bool(info.private))


def _pushed_manifest(api: "HfApi", repo: str, commit: str | None) -> dict[str, Any] | None:
    with TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo, MANIFEST, repo_type="dataset", revision=commit, cache_dir=cache)
        # What is no manifest at all is another tool's.
        with suppress(RococapError):
            return read_json(Path(path))
    return None


def _check_pushable(repo: str, there: dict[str, Any] | None, new: dict[str, Any]) -> None:
    if not _is_ours(there):
        raise RococapError(
            f"{repo} holds a data set that rococap did not push, and is left as it is: --push a new name."
        )
    if _is_another(there, new):
        raise RococapError(
            f"{repo} holds another export (run {there.get('run')}, format {there.get('format')}), and is left as it "
            "is: --push a new name."
        )
    if others := _lost_splits(there, new):
        raise RococapError(
            f"{repo} also holds {', '.join(others)}, which would be lost: export every split that it is to hold "
            f"({_as_options(others, new)}), or --push a new name."
        )


@contextmanager
def _pushing(repo: str, folder: Path | None = None) -> Iterator[None]:
    try:
        yield
    # Its errors have no base in common: OSError, ValueError, those of its HTTP client, RuntimeError from Xet.
    except Exception as error:
        why_not = str(error) if isinstance(error, RococapError) else _why_not(error, repo)
        whole = f" The folder is whole: {folder}" if folder else ""
        raise RococapError(why_not + whole) from error


def _why_not(error: Exception, repo: str) -> str:
    from huggingface_hub import constants, errors

    origin = error.__cause__ or error
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, and nothing can be pushed: unset it and run this again."
        case errors.LocalTokenNotFoundError():
            return "You are not logged in to the hub: hf auth login, with a token that may write, then run this again."
        case errors.HFValidationError():
            return f"{repo!r} names no repository: give --push OWNER/NAME."
    if status == 401:
        return "The hub does not know this token: hf auth login, or correct HF_TOKEN, then run this again."
    if status in (403, 404):
        return f"You may not write to {repo} on the hub: hf auth login with a token that may, or --push another name."
    reason = next(iter(str(origin).splitlines()), type(origin).__name__)
    return f"The hub at {constants.ENDPOINT} cannot be used ({reason}): check the network, then run this again."


# --- Pictures and captions -------------------------------------------------------------------------------------

SAMPLES_PER_TAR = 1_000
LONGEST_KEY = LONGEST_ID
"""Bytes before the ending. In percent an id is up to three times as long as in the data set."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """`key` names the files of one picture; `files` are their endings and bytes, the picture's first."""

    key: str
    files: dict[str, bytes]


def _write_tars(samples: Iterator[_Sample], folder: Path, split: str) -> int:
    done = 0
    for number, first in enumerate(samples):
        with tarfile.open(folder / f"{split}-{number:06}.tar", "w") as tar:
            for sample in chain([first], islice(samples, SAMPLES_PER_TAR - 1)):
                done += 1
                for ending, data in sample.files.items():
                    member = tarfile.TarInfo(sample.key + ending)
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    return done


def _write_pairs(samples: Iterator[_Sample], folder: Path, split: str) -> int:
    done = 0
    (folder / split).mkdir()
    for sample in samples:
        done += 1
        for ending, data in sample.files.items():
            if ending != ".json":
                (folder / split / (sample.key + ending)).write_bytes(data)
    return done


def _with_pictures(
    write: Callable[[Iterator[_Sample], Path, str], int],
) -> Callable[[_Source, Sequence[Counts], Path], list[Written]]:
    def write_all(source: _Source, counts: Sequence[Counts], folder: Path) -> list[Written]:
        run = source.run
        splits = [one.split for one in counts if one.done]
        located = datasets.locate(run.dataset, splits, run.dataset_revision or None)
        written = [Written(one.split, 0, one.total - one.done, dict(one.flags)) for one in counts]
        with PictureReader(located.root) as reader:
            for one, told in zip(counts, written, strict=True):
                told.captions = write(_samples(source, one, reader, told.without_picture), folder, one.split)
        return written

    return write_all


_OF_SAMPLE = (
    "j.image_id, (SELECT path FROM shards WHERE shards.id = i.shard_id), i.split, i.row_group, i.row_in_group, "
    "i.image_id, i.caption, c.text, c.flags, i.cui"
)


def _samples(
    source: _Source, counts: Counts, reader: PictureReader, without_picture: dict[str, str]
) -> Iterator[_Sample]:
    # Each page is a transaction of its own, also on PostgreSQL, which ends one that waits a minute for pictures.
    pages = source.pages(lambda: transaction(source.database), counts.split, _OF_SAMPLE)
    for n, row in enumerate(chain.from_iterable(pages), 1):
        place, texts = Place(*(*row[1:6], source.run.columns)), row[6:]
        ((_, data),) = reader.read([place])
        try:
            yield _sample(source.run, place, _picture(data), *texts)
        except PictureError as error:
            without_picture[place.image_id] = str(error)
        source.progress(f"{counts.split}: exporting", n, counts.done)


def _picture(data: bytes | PictureError) -> bytes:
    if isinstance(data, PictureError):
        raise data
    return data


def _sample(run: Run, place: Place, picture: bytes, original: str, generated: str, flags: str, cui: str) -> _Sample:
    about = {
        "image_id": place.image_id,
        "original_caption": original,
        "cui": _split(cui, ";"),
        "flags": _split(flags, ","),
        "model": run.recipe.model,
        "split": place.split,
    }
    told = json.dumps(about, ensure_ascii=False)
    ending, shown = as_file(picture, run.recipe.frame)
    return _Sample(_key(place.image_id), {ending: shown, ".txt": generated.encode(), ".json": told.encode()})


def _key(image_id: str) -> str:
    """Letters, digits, `_`, `-`, `~`, the rest in percent: a dot would begin the ending, and no two ids share a key."""
    key = quote(image_id, safe="").replace(".", "%2E") or "%"
    if len(key) <= LONGEST_KEY:
        return key
    # No byte is written as %-, so that a key that was cut is no other picture's.
    return f"{key[:200]}%-{hashlib.sha256(image_id.encode()).hexdigest()[:32]}"


_WRITERS = {
    "hf": _write_hub_layout,
    "webdataset": _with_pictures(_write_tars),
    "kohya": _with_pictures(_write_pairs),
}
