"""How long it takes to say what a year of WAL can be restored to, and where a moment lies in it."""

import json
import os
import subprocess
import time

from .figures import print_table, spread
from .programs import account, make_folder
from .receivers import Anywhen, Receiving, wait_until
from .s3_endpoint import Endpoint, program
from .server import Server

#: how far the stream may fall behind while the WAL is made: the server keeps it so long
LAG_BYTES_MAX = 200 << 20

MAKE_SEGMENTS = """
do $$ begin
  for n in 1..{count} loop
    perform pg_logical_emit_message(true, 'year', 'a small transaction');
    perform pg_switch_wal();
    if n % 50 = 0 then commit; end if;
  end loop;
end $$
"""


def add_arguments(group):
    group.add_argument("--segments", type=int, default=100_000, metavar="N",
                       help="complete segments in the repository, of 1 MiB each [100000: a year, of 16 MiB at 53 kB/s]")
    group.add_argument("--year-backups", type=int, default=50, metavar="N", help="backups between them [50]")
    group.add_argument("--slow-ms", type=int, default=40, metavar="MS",
                       help="over S3 each request waits a time drawn between 0 and this [40]")


def run(options, programs, folder):
    program(options)  # missed now, rather than in an hour
    buckets = make_folder(folder / "buckets")
    with Server(programs, folder / "year", segment_mib=1, settings="fsync = off\nmax_wal_size = 1GB") as server:
        tool = Anywhen("anywhen stream", ("--repo", f"file://{buckets / 'year'}"), configured=True)
        with Receiving(tool, programs, server, "year", folder / "received") as receiving:
            fill(options, programs, server, receiving, buckets / "year")
    stored = sum(1 for path in (buckets / "year").rglob("*") if path.is_file())
    print(f"objects: {stored}", flush=True)
    runs = measure(options, programs, folder, "a folder", ["--repo", f"file://{buckets / 'year'}"], {}, None)
    with Endpoint(options, buckets, options.slow_ms) as endpoint:
        runs += measure(options, programs, folder, "S3", ["--repo", "s3://year"], endpoint.environment(), endpoint)
    report(runs)
    return {"objects": stored, "runs": runs}


def fill(options, programs, server, receiving, repository):
    count = options.segments // options.year_backups
    for _ in range(options.year_backups):
        receiving.must_run()
        ask(programs, ["backup", "--repo", f"file://{repository}", "-d", server.conninfo, "--quiet"], {})
        server.sql(MAKE_SEGMENTS.format(count=count))
        server.sql("checkpoint")
        wait_until("the stream keeps up", lambda: lag(server) < LAG_BYTES_MAX, receiving, every=0.2)
    wait_until("all is stored", lambda: lag(server) == 0, receiving)


def lag(server):
    behind = server.sql("select coalesce(max(pg_current_wal_flush_lsn() - flush_lsn), -1) from pg_stat_replication"
                        " where flush_lsn is not null")
    behind = int(behind)
    return behind if behind >= 0 else LAG_BYTES_MAX * 2


def measure(options, programs, folder, place, repo, environment, endpoint):
    listed = json.loads(ask(programs, ["list", "--json", *repo], environment)["said"])["backups"]
    plan = ["restore", "--dry-run", "--json", "-D", str(folder / "planned")]
    commands = {
        "status": ["status", "--json"],
        "plan: the latest": plan,
        "plan: the latest, from the first backup": [*plan, "--backup", listed[0]["id"]],
        "plan: the middle, from the first backup": [*plan, "--backup", listed[0]["id"],
                                                    "--to", listed[len(listed) // 2]["finished_at"]],
        "a transaction that there is not": [*plan, "--to-xid", "4000000000"],
    }
    runs = []
    for _ in range(options.rounds):
        for name, command in commands.items():
            before = endpoint.requests() if endpoint else None
            asked = ask(programs, [*command, *repo], environment, may_fail=name.startswith("a transaction"))
            requests = endpoint.requests() - before - 1 if endpoint else None
            runs.append({"place": place, "command": name, "requests": requests, "seconds": asked["seconds"],
                         "peak_mib": asked["peak_mib"]})
    return runs


def ask(programs, arguments, environment, may_fail=False):
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", **environment}
    begun = time.perf_counter()
    process = subprocess.Popen([str(programs.anywhen), *arguments], stdout=subprocess.PIPE, text=True, cwd="/",
                               env=environment, **account())
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code != 0 and not (may_fail and code == 3):
        raise RuntimeError(f"anywhen {' '.join(arguments)} ended with {code}: {said}")
    return {"said": said, "seconds": seconds, "peak_mib": usage.ru_maxrss / 1024}


def report(runs):
    rows = []
    for place, command in dict.fromkeys((run["place"], run["command"]) for run in runs):
        own = [run for run in runs if (run["place"], run["command"]) == (place, command)]
        requests = [run["requests"] for run in own]
        rows.append([place, command, spread([run["seconds"] for run in own], 2),
                     spread([run["peak_mib"] for run in own]), spread(requests) if None not in requests else ""])
    print_table(["in", "command", "seconds", "peak MiB", "requests"], rows)
