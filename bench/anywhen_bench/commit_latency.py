"""How long after a commit returned its record is durable in the repository, at the default settings."""

import random
import threading
import time

from .figures import distribution, print_table
from .receivers import Anywhen, PgReceivewal, Receiving, chosen, wait_until
from .server import Server, lsn_number
from .sync_commits import commit, tools

TOOLS = [PgReceivewal("pg_receivewal --synchronous", ("--synchronous",)), Anywhen("anywhen stream")]

#: how far apart two looks at what is durable are at most: the error of each figure
LOOK_SECONDS = 0.005


def add_arguments(group):
    group.add_argument("--latency-seconds", type=int, default=60, metavar="S", help="for each tool and rate [60]")
    group.add_argument("--commit-rates", default="2,100", metavar="N,N", help="commits per second [2,100]")


def run(options, programs, folder):
    runs = []
    rates = [float(rate) for rate in options.commit_rates.split(",")]
    with Server(programs, folder / "latency") as server:
        server.sql("create table commits (id bigserial primary key, client int, note text)")
        for tool in chosen(TOOLS, options.only):
            for rate in rates:
                ms = until_durable(tool, programs, server, folder, rate, options.latency_seconds)
                runs.append({"tool": tool.name, "how": f"{rate:g} commits/s", "ms": ms})
        for tool in chosen([tool for tool in tools(programs) if tool], options.only):
            figures = commit(tool, programs, server, folder / "work", 1, min(options.latency_seconds, 20))
            runs.append({"tool": tool.name, "how": "1 client waits for it", "ms": figures["ms"]})
    parts = ["p50", "p90", "p99", "max"]
    rows = [[run["tool"], run["how"], run["ms"]["count"], *(f"{run['ms'][part]:.1f}" for part in parts)] for run in runs]
    print_table(["tool", "commits", "count", *(f"{part} ms" for part in parts)], rows)
    return {"runs": runs}


def until_durable(tool, programs, server, folder, rate, seconds):
    """Commits at random moments, `rate` a second, while another session watches what is durable."""
    server.sql("select pg_create_physical_replication_slot('bench', true)")
    with Receiving(tool, programs, server, "bench", folder / "received") as receiving, \
            server.session() as committing, server.session() as watching:
        flushed = "select flush_lsn from pg_stat_replication where flush_lsn is not null"
        wait_until("the tool has stored something", lambda: watching.ask(flushed) != "", receiving)
        seen, done = [], threading.Event()
        watch = threading.Thread(target=look, args=(watching, flushed, seen, done))
        watch.start()
        try:
            commits = commit_at_random(committing, rate, seconds)
            last = commits[-1][1]
            wait_until("the last commit is durable", lambda: seen and seen[-1][1] >= last, receiving)
        finally:
            done.set()
            watch.join()
    wait_until("the slot is free", lambda: server.sql("select active from pg_replication_slots") == "f")
    server.sql("select pg_drop_replication_slot('bench')")
    return distribution(waits(commits, seen))


def commit_at_random(session, rate, seconds):
    """When each commit returned, and a position that is not before its record's end."""
    draw, commits = random.Random(1), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(draw.expovariate(rate))
        session.ask("insert into commits (client, note) values (1, 'at random')")
        returned = time.monotonic()
        commits.append((returned, lsn_number(session.ask("select pg_current_wal_flush_lsn()"))))
    return commits


def look(session, flushed, seen, done):
    while not done.is_set():
        if answer := session.ask(flushed):
            seen.append((time.monotonic(), lsn_number(answer)))
        time.sleep(LOOK_SECONDS)


def waits(commits, seen):
    """Milliseconds from each commit to the first look that found it durable."""
    found, looks = [], iter(seen)
    at, position = next(looks)
    for returned, lsn in commits:
        while position < lsn:
            at, position = next(looks)
        found.append(max(0.0, at - returned) * 1000)
    return found
