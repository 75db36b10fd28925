"""How fast each tool receives WAL that is there already, and what that costs."""

import os
import time

from .figures import median, print_table, spread
from .machine import busy_seconds, family_seconds
from .receivers import Anywhen, PgReceivewal, Receiving, chosen, wait_until
from .server import Server, lsn_number, lsn_text, stored_bytes

TOOLS = [
    PgReceivewal("pg_receivewal"),
    PgReceivewal("pg_receivewal --compress=lz4", ("--compress=lz4",)),
    PgReceivewal("pg_receivewal --compress=gzip:1", ("--compress=gzip:1",)),
    Anywhen("anywhen stream"),
]

#: the server's WAL is read from memory, as right after it was written; nothing else is durable here
SETTINGS = """
fsync = off
synchronous_commit = off
wal_sender_timeout = 10min
"""


def add_arguments(group):
    group.add_argument("--wal-mb", type=int, default=1500, metavar="MB", help="WAL to receive [1500]")
    group.add_argument("--segment-mib", type=int, default=16, metavar="MIB", help="initdb --wal-segsize [16]")
    group.add_argument("--seed", type=int, default=1, help="of the rows that are written [1]")
    group.add_argument("--gzip", action="store_true", help="with pg_receivewal --compress=gzip:1, which is slow")
    group.add_argument("--anywhen-level", action="append", default=[], metavar="N", type=int,
                       help="with anywhen at this zstd level of WAL too; may be given several times")


def run(options, programs, folder):
    if programs.pg_major() < 15:
        raise SystemExit("bench: stream-rate needs PostgreSQL 15 or later, whose pg_receivewal starts where its slot does")
    tools = chosen([tool for tool in TOOLS if usable(tool, programs, options)], options.only)
    tools += [at_level(level, folder) for level in options.anywhen_level]
    slots = {(tool.name, round_): f"bench_{number}_{round_}"
             for number, tool in enumerate(tools) for round_ in range(options.rounds)}
    with Server(programs, folder / "rate", options.segment_mib, len(slots) + 1, SETTINGS) as server:
        for slot in slots.values():
            server.sql(f"select pg_create_physical_replication_slot('{slot}', true)")
        start, end = write_wal(server, options)
        raw = end - start
        print(f"{raw / 1e6:.0f} MB of WAL in segments of {options.segment_mib} MiB")
        runs = []
        for round_ in range(options.rounds):
            # who comes first changes
            turn = round_ % len(tools)
            for tool in tools[turn:] + tools[:turn]:
                slot = slots[tool.name, round_]
                figures = receive_all(tool, programs, server, slot, end, folder / "received")
                runs.append({"tool": tool.name, "round": round_, **figures})
                server.sql(f"select pg_drop_replication_slot('{slot}')")
    return report(tools, runs, raw)


def usable(tool, programs, options):
    if "lz4" in tool.name and not programs.pg_build_has("lz4"):
        print(f"without {tool.name}: this build has no lz4")
        return False
    return options.gzip or "gzip" not in tool.name


def at_level(level, folder):
    config = folder / f"level-{level}.toml"
    config.write_text(f"""
[repository.bench]
url = "file://{folder / 'received'}"
compression = {{ wal = "zstd:{level}" }}
[cluster.main]
repositories = ["bench"]
""")
    config.chmod(0o644)
    return Anywhen(f"anywhen stream, zstd:{level}", ("--config", str(config)), configured=True)


def write_wal(server, options):
    """Bulk loads and small transactions in turn, until there is enough; ends with a full segment."""
    start = lsn_number(server.sql("select restart_lsn from pg_replication_slots limit 1"))
    server.pgbench("-i", "-q", "-s", "10")
    server.sql("create table documents (id bigint primary key, name text, body jsonb)")
    server.sql("create index on documents (name)")
    part = 0
    while wal_position(server) - start < options.wal_mb * 1_000_000:
        first = part * 100_000
        # hashed text, which does not compress, beside JSON, which does
        server.sql(f"""
            insert into documents
            select id, md5(id || 'name {options.seed}'),
                   jsonb_build_object('id', id, 'state', (array['new', 'paid', 'sent'])[id % 3 + 1],
                                      'at', timestamp '2026-01-01' + id * interval '1 second',
                                      'key', md5(id || 'key {options.seed}'), 'note', repeat('as before ', 5))
            from generate_series({first + 1}, {first + 100_000}) as id""")
        server.pgbench("-n", "-c", "8", "-j", "2", "-t", "2500", f"--random-seed={options.seed + part}")
        server.sql("checkpoint")
        part += 1
    switched = lsn_number(server.sql("select pg_switch_wal()"))
    size = server.segment_bytes
    return start // size * size, -(-switched // size) * size


def wal_position(server):
    return lsn_number(server.sql("select pg_current_wal_insert_lsn()"))


def receive_all(tool, programs, server, slot, end, folder):
    # what the one before left to write must not slow down this one
    os.sync()
    with server.session() as session:
        busy, of_server = busy_seconds(), family_seconds(server.process.pid)
        with Receiving(tool, programs, server, slot, folder, lsn_text(end - 1)) as receiving:
            if tool.stops_at_end:
                while receiving.runs():
                    time.sleep(0.005)
                if receiving.process.returncode != 0:
                    raise RuntimeError(f"{tool.name} failed:\n{receiving.what_it_said()}")
            else:
                ask = f"select flush_lsn >= '{lsn_text(end)}' from pg_stat_replication where flush_lsn is not null"
                wait_until("all is stored", lambda: session.ask(ask) == "t", receiving)
            seconds = time.perf_counter() - receiving.begun
            cpu = receiving.cpu_seconds()
            busy, of_server = busy_seconds() - busy, family_seconds(server.process.pid) - of_server
            if not tool.stops_at_end:
                receiving.stop()
            stored, files = stored_bytes(folder)
            peak = receiving.peak_mib()
    return {"seconds": seconds, "cpu_seconds": cpu, "server_cpu_seconds": of_server,
            "elsewhere_cpu_seconds": max(0.0, busy - cpu - of_server), "peak_mib": peak,
            "stored_bytes": stored, "files": files}


def report(tools, runs, raw):
    rows = []
    rates = {tool.name: [raw / 1e6 / run["seconds"] for run in runs if run["tool"] == tool.name] for tool in tools}
    peers = [median(rates[tool.name]) for tool in tools if isinstance(tool, PgReceivewal)]
    for tool in tools:
        own = [run for run in runs if run["tool"] == tool.name]
        rows.append([
            tool.name,
            spread(rates[tool.name]),
            f"{median(rates[tool.name]) / max(peers):.2f}" if peers else "",
            f"{median(run['stored_bytes'] for run in own) / raw:.1%}",
            spread([run["cpu_seconds"] / raw * 1e9 for run in own], 2),
            spread([run["server_cpu_seconds"] / raw * 1e9 for run in own], 2),
            spread([run["elsewhere_cpu_seconds"] / raw * 1e9 for run in own], 2),
            spread([run["peak_mib"] for run in own]),
        ])
    print_table(["tool", "MB/s", "of best peer", "stored", "CPU s/GB", "server's", "others'", "peak MiB"], rows)
    return {"raw_bytes": raw, "runs": runs}
