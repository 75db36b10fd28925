"""The command line: what all jobs share, and which jobs there are."""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from . import backups, commit_latency, idle_cost, replay, stream_rate, sync_commits, year
from .machine import describe_machine
from .programs import Programs

JOBS = {
    "stream-rate": stream_rate,
    "sync-commits": sync_commits,
    "commit-latency": commit_latency,
    "idle-cost": idle_cost,
    "backups": backups,
    "year": year,
    "replay": replay,
}

EPILOG = """\
examples:
  bench/run stream-rate                                the rate at full speed, beside pg_receivewal
  bench/run stream-rate --segment-mib 64 --rounds 1    the same with large segments: peak memory
  bench/run sync-commits --clients 1,8,32 --seconds 20
  bench/run commit-latency
  bench/run idle-cost --minutes 5
  bench/run backups --database-mb 500
  bench/run year --segments 20000
  bench/run replay --wal-segments 512
  bench/run all --json figures.json                    all of them

The server is found in $ANYWHEN_PG_DIR/*/bin and /usr/lib/postgresql/*/bin; build Anywhen first:
  cargo build --release
"""


def main():
    options = arguments()
    programs = Programs.find(options.pg_bin, options.anywhen)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="anywhen-bench-", dir=options.folder) as folder:
        folder = Path(folder)
        programs = programs.settle_in(folder)
        machine = describe_machine(programs, folder)
        print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
        results = {"machine": machine, "jobs": {}}
        for name in JOBS if options.job == "all" else [options.job]:
            print(f"\n## {name}", flush=True)
            results["jobs"][name] = JOBS[name].run(options, programs, folder)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def arguments():
    parser = argparse.ArgumentParser(
        prog="bench/run",
        description="Measures Anywhen beside the tools that people use today, in one run on one machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=[*JOBS, "all"])
    parser.add_argument("--pg-bin", type=Path, metavar="DIR", help="PostgreSQL's programs [newest release found]")
    parser.add_argument("--anywhen", type=Path, metavar="PATH", default=default_anywhen(),
                        help="the program to measure [target/release/anywhen]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often everything is repeated [3]")
    parser.add_argument("--only", metavar="TOOLS", help="of the job's tools, those whose names contain one of these words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single figure, for programs")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the servers and the stores are [$TMPDIR]")
    for name, job in JOBS.items():
        job.add_arguments(parser.add_argument_group(name))
    return parser.parse_args()


def default_anywhen():
    target = os.environ.get("CARGO_TARGET_DIR") or Path(__file__).resolve().parents[2] / "target"
    return Path(target) / "release" / "anywhen"
