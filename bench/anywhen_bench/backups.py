"""How long each tool takes to back up a database and to restore it, and what that costs."""

import os
import random
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

from .figures import median, print_table, spread
from .machine import busy_seconds, family_seconds, write_seconds
from .pgbackrest import stanza
from .programs import account, give_away, make_folder
from .receivers import chosen
from .server import Server, stored_bytes

#: the database is read from memory where it fits, as one that is in use
SETTINGS = """
fsync = off
synchronous_commit = off
archive_mode = on
archive_command = 'true'
"""

#: of zstd, for all alike
LEVEL = 3


@dataclass(frozen=True)
class PgBasebackup:
    """Tar files, compressed by the client; restored by tar."""

    name: str
    compression: str

    def backup(self, programs, server, folder):
        return [programs.pg("pg_basebackup"), "-D", folder / "backup", "-Ft", f"--compress={self.compression}",
                "-Xfetch", "--checkpoint=fast", "-d", server.conninfo]

    def restore(self, programs, folder, target):
        del programs
        unpack = f"mkdir -m 700 {target} && zstd -dc {folder}/backup/base.tar.zst | tar -x -C {target} && sync -f {target}"
        return ["/bin/sh", "-c", unpack]

    def prepare(self, programs, server, folder):
        """Nothing has to be set up."""


@dataclass(frozen=True)
class Anywhen:
    """A local repository, as it is set by default but for the level."""

    name: str = "anywhen"

    def prepare(self, programs, server, folder):
        del programs, server
        config = folder / "anywhen.toml"
        config.write_text(f"""
[repository.bench]
url = "file://{folder / 'repository'}"
compression = {{ backup = "zstd:{LEVEL}" }}
[cluster.main]
repositories = ["bench"]
""")
        give_away(config)

    def backup(self, programs, server, folder):
        return [programs.anywhen, "backup", "--quiet", "--checkpoint", "fast", "--config", folder / "anywhen.toml",
                "-d", server.conninfo]

    def backup_again(self, programs, server, folder):
        return self.backup(programs, server, folder)

    def restore(self, programs, folder, target):
        return [programs.anywhen, "restore", "--quiet", "-D", target, "--config", folder / "anywhen.toml"]


@dataclass(frozen=True)
class PgBackRest:
    """A local repository with bundles and, from 2.46 on, where they are no beta, block maps; two processes."""

    name: str = "pgbackrest"

    def prepare(self, programs, server, folder):
        config = folder / "pgbackrest.conf"
        config.write_text(f"""
[global]
repo1-path={folder / 'repository'}
log-path={folder}
lock-path={folder}
spool-path={folder}
log-level-console=error
log-level-file=off
compress-type=zst
compress-level={LEVEL}
process-max=2
repo1-bundle=y
{"repo1-block=y" if self.version() >= (2, 46) else ""}
archive-check=n
start-fast=y
{stanza(server)}""")
        give_away(config)
        run_command([*self._call(folder), "stanza-create"], folder)

    def backup(self, programs, server, folder):
        return [*self._call(folder), "--type=full", "backup"]

    def backup_again(self, programs, server, folder):
        return [*self._call(folder), "--type=incr", "backup"]

    def restore(self, programs, folder, target):
        return [*self._call(folder), f"--pg1-path={target}", "--type=none", "restore"]

    @staticmethod
    def version():
        said = subprocess.run(["pgbackrest", "version"], check=True, capture_output=True, text=True).stdout
        major, minor = re.search(r"(\d+)\.(\d+)", said).groups()
        return int(major), int(minor)

    def _call(self, folder):
        return ["pgbackrest", f"--config={folder / 'pgbackrest.conf'}", "--stanza=main"]


def add_arguments(group):
    group.add_argument("--database-mb", type=int, default=2000, metavar="MB", help="size of the database [2000]")
    group.add_argument("--small-files", type=int, default=0, metavar="N",
                       help="so many files of 0 to 8 KB besides, in a folder of the data directory [0]")
    group.add_argument("--empty-tables", type=int, default=0, metavar="N", help="so many tables besides [0]")


def run_command(command, folder):
    """What a command cost: its children, which it waits for, are counted with it."""
    command = [str(part) for part in command]
    # its own environment: settings of whoever measures must not change what is measured
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    with open(folder / "said", "w+b") as said:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd="/", env=environment, start_new_session=True,
                                   **account())
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def run(options, programs, folder):
    tools = chosen([tool for tool in all_tools() if usable(tool, programs)], options.only)
    with Server(programs, folder / "database", settings=SETTINGS) as server:
        if int(server.sql("show server_version_num")) >= 170000:
            # so that a second backup reads what has changed alone; the server's work for it falls on every tool alike
            server.set(summarize_wal="on")
        fill(server, options.database_mb)
        add_tables(server, options.empty_tables)
        raw = int(server.sql("select sum(pg_database_size(oid)) from pg_database"))
        raw += add_files(server, options.small_files)
        files = sum(len(files) for _, _, files in os.walk(server.data))
        print(f"{raw / 1e6:.0f} MB in {files} files, zstd level {LEVEL} for all")
        runs = []
        writes = []
        for round_ in range(options.rounds):
            writes.append(write_seconds(folder, raw))
            # who comes first changes
            turn = round_ % len(tools)
            for tool in tools[turn:] + tools[:turn]:
                place = make_folder(folder / "stored")
                tool.prepare(programs, server, place)
                measured = measure(tool, programs, server, place, len(runs))
                runs.append({"tool": tool.name, "round": round_, **measured})
                shutil.rmtree(place)
    return report(tools, runs, raw, writes)


def all_tools():
    return [
        PgBasebackup("pg_basebackup zstd", f"client-zstd:level={LEVEL}"),
        PgBasebackup("pg_basebackup zstd, 2 workers", f"client-zstd:level={LEVEL},workers=2"),
        PgBackRest(),
        Anywhen(),
    ]


def usable(tool, programs):
    if isinstance(tool, PgBasebackup) and not programs.pg_build_has("zstd"):
        print(f"without {tool.name}: this build has no zstd")
        return False
    if isinstance(tool, PgBackRest) and not shutil.which("pgbackrest"):
        print("without pgbackrest: it is not installed")
        return False
    return True


def fill(server, megabytes):
    """Half of it pgbench's tables, half hashed text, which does not compress, and JSON, which does."""
    server.pgbench("-i", "-q", "-s", max(1, megabytes // 2 // 15))
    server.sql("create table documents (id bigint primary key, name text, body jsonb)")
    server.sql("create index on documents (name)")
    first = 1
    while int(server.sql("select pg_database_size('postgres')")) < megabytes * 1_000_000:
        server.sql(f"""
            insert into documents
            select id, md5(id || 'name'),
                   jsonb_build_object('id', id, 'state', (array['new', 'paid', 'sent'])[id % 3 + 1],
                                      'at', timestamp '2026-01-01' + id * interval '1 second',
                                      'key', md5(id || 'key'), 'note', repeat('as before ', 5))
            from generate_series({first}, {first + 199_999}) as id""")
        first += 200_000
    server.sql("vacuum (freeze, analyze)")
    server.sql("checkpoint")


def add_tables(server, count):
    """Each is a file of no bytes, one for what does not fit into its rows, and the index of that."""
    # a transaction has no more locks than that
    for first in range(0, count, 500):
        server.sql(f"""
            do $$ begin
                for number in {first}..{min(first + 500, count) - 1} loop
                    execute format('create table empty_%s (id bigint, words text)', number);
                end loop;
            end $$""")
    server.sql("checkpoint")


def add_files(server, count):
    """Files that no server has, but as many as one with many tables; their bytes."""
    folder = server.data / "small_files"
    folder.mkdir()
    lots = random.Random(1)
    written = 0
    for number in range(count):
        content = lots.randbytes(200) * (number % 41)
        (folder / f"{number:08d}").write_bytes(content)
        written += len(content)
    give_away(folder)
    for path in folder.iterdir():
        give_away(path)
    return written


def change(server, number):
    """Updates one row of a hundred, those that lie together; the bytes of the table's pages that changed."""
    accounts = int(server.sql("select max(aid) from pgbench_accounts"))
    first = 1 + accounts // 100 * (number % 100)
    rows = f"aid between {first} and {first + accounts // 100 - 1}"
    pages = f"select count(distinct (ctid::text::point)[0]) from pgbench_accounts where {rows}"
    before = int(server.sql(pages))
    server.sql(f"update pgbench_accounts set abalance = abalance + 1 where {rows}")
    after = int(server.sql(pages))
    server.sql("checkpoint")
    return (before + after) * 8192


def measure(tool, programs, server, place, number):
    target = place / "restored"
    # what the one before left to write must not slow down this one
    os.sync()
    busy, of_server = busy_seconds(), family_seconds(server.process.pid)
    backup = run_command(tool.backup(programs, server, place), place)
    of_server = family_seconds(server.process.pid) - of_server
    elsewhere = busy_seconds() - busy - of_server - backup["cpu_seconds"]
    stored, files = stored_bytes(place)
    os.sync()
    busy = busy_seconds()
    restore = run_command(tool.restore(programs, place, target), place)
    elsewhere_restoring = busy_seconds() - busy - restore["cpu_seconds"]
    if not (target / "global" / "pg_control").exists():
        raise RuntimeError(f"{tool.name} restored nothing")
    again = {}
    if hasattr(tool, "backup_again"):
        changed = change(server, number)
        os.sync()
        cost = run_command(tool.backup_again(programs, server, place), place)
        # what was restored is not what was stored
        shutil.rmtree(target)
        again = {"again": {**cost, "stored_bytes": stored_bytes(place)[0] - stored, "changed_bytes": changed}}
    return {
        **again,
        "backup": {**backup, "server_cpu_seconds": of_server, "elsewhere_cpu_seconds": max(0.0, elsewhere)},
        "restore": {**restore, "elsewhere_cpu_seconds": max(0.0, elsewhere_restoring)},
        "stored_bytes": stored,
        "files": files,
    }


def report(tools, runs, raw, writes):
    for step in ["backup", "restore"]:
        rows = []
        took = {tool.name: [run[step]["seconds"] for run in runs if run["tool"] == tool.name] for tool in tools}
        peers = [median(took[tool.name]) for tool in tools if not isinstance(tool, Anywhen)]
        for tool in tools:
            own = [run for run in runs if run["tool"] == tool.name]
            rows.append([
                tool.name,
                spread(took[tool.name], 2),
                f"{median(took[tool.name]) / min(peers):.2f}" if peers else "",
                spread([run[step]["cpu_seconds"] for run in own], 2),
                spread([run[step]["elsewhere_cpu_seconds"] for run in own], 2),
                spread([run[step]["peak_mib"] for run in own]),
                f"{median(run['stored_bytes'] for run in own) / raw:.1%} in {median(run['files'] for run in own):.0f} files",
            ])
        print(f"\n{step}:")
        if step == "restore":
            print(f"as many bytes in one file, written and synced: {spread(writes, 2)} s")
        print_table(["tool", "seconds", "of best peer", "CPU s", "others'", "peak MiB", "stored"], rows)
    report_again(tools, runs)
    return {"raw_bytes": raw, "runs": runs, "write_seconds": writes}


def report_again(tools, runs):
    rows = []
    for tool in tools:
        own = [run["again"] for run in runs if run["tool"] == tool.name and "again" in run]
        if own:
            rows.append([
                tool.name,
                spread([run["seconds"] for run in own], 2),
                spread([run["cpu_seconds"] for run in own], 2),
                spread([run["peak_mib"] for run in own]),
                spread([run["stored_bytes"] / 1e6 for run in own], 1),
                spread([run["stored_bytes"] / run["changed_bytes"] for run in own], 2),
            ])
    print("\nsecond backup, after one row of a hundred of the largest table was updated:")
    print_table(["tool", "seconds", "CPU s", "peak MiB", "stored MB", "of changed pages"], rows)
