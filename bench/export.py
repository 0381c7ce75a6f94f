"""Measures exporting a split as CSV: rococap against the csv module on a plain sqlite3 cursor. Both write the same
bytes.
"""

import argparse
import csv
import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

from report import Clock, Line, alternate, compare, memory_mb, show, timed
from rows import SPLIT, connect, fill

from rococap import db, queue
from rococap.recipe import Recipe
from rococap.results import export, snapshot

# The columns that rococap exports. SQLite does the conversions, so that the peer runs no Python code per row.
SELECT = """
    SELECT i.image_id, i.caption, c.text, c.processing_ms / 1000, ?,
        strftime('%Y-%m-%dT%H:%M:%f', c.generated_at / 1000.0, 'unixepoch') || 'Z', j.split
    FROM jobs j JOIN captions c ON c.job_id = j.id JOIN images i ON i.id = j.image_id
    WHERE j.run_id = 1 AND j.split = ? AND j.status = 'done' ORDER BY j.image_id
"""


def write_ours(database: Path, target: Path) -> None:
    engine = db.connect(f"sqlite:///{database}")
    with db.transaction(engine) as conn:
        run = queue.get_run(conn, "bench")
    export.export(engine, run, SPLIT, target)
    engine.dispose()


def write_peer(database: Path, target: Path) -> None:
    connection = connect(database)
    with target.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(snapshot.COLUMNS) + "\n")
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerows(connection.execute(SELECT, (Recipe().model, SPLIT)))
        file.flush()
        os.fsync(file.fileno())
    connection.close()


WRITERS = {"ours": write_ours, "peer": write_peer}


def grown(database: Path, name: str) -> float:
    """The peak resident memory of an export in a separate process, in MB above that of the imports."""
    command = [sys.executable, __file__, "--grow", name, str(database)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def grow(name: str, database: Path) -> None:
    db.connect(f"sqlite:///{database}").dispose()
    base = memory_mb("VmRSS")
    WRITERS[name](database, database.with_name("grown.csv"))
    print(memory_mb("VmHWM") - base)


def measure(database: Path, rows: int, n_rounds: int) -> list[Line]:
    peer, ours = database.with_name("peer.csv"), database.with_name("ours.csv")
    rounds = alternate(
        n_rounds, lambda: timed(lambda: write_peer(database, peer)), lambda: timed(lambda: write_ours(database, ours))
    )
    if not filecmp.cmp(peer, ours, shallow=False):
        raise SystemExit("rococap and the peer wrote different files")
    memory = {name: grown(database, name) for name in WRITERS}
    clocks: tuple[Clock, ...] = ("wall", "cpu")
    return [
        *(compare("export CSV, per row", rounds, clock, "<= 1.3", rows=rows) for clock in clocks),
        Line(
            "memory above the base, MB", f"{memory['peer']:.0f}", f"{memory['ours']:.0f}", (memory["ours"],), "<= 150"
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grow", nargs=2, metavar=("WHO", "DATABASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        return grow(options.grow[0], Path(options.grow[1]))
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "bench.db")
        fill(database, options.rows, done=True)
        lines = measure(database, options.rows, options.rounds)
        size = (database.with_name("ours.csv").stat().st_size) / 1e6
    return show(lines, f"{options.rows} rows, a file of {size:.0f} MB, {options.rounds} rounds")


if __name__ == "__main__":
    main()
