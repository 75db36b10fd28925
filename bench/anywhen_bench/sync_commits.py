"""How many commits the server makes while each of them waits for the tool to have stored it."""

import shutil

from .figures import distribution, median, print_table, spread
from .programs import make_folder
from .receivers import Anywhen, PgReceivewal, Receiving, chosen, wait_until
from .server import Server

SCRIPT = """\
\\set client random(1, 1000000)
insert into commits (client, note) values (:client, 'a commit that waits for the archive');
"""


def tools(programs):
    flags = ("--synchronous",) if programs.stream_takes("--synchronous") else ()
    return [
        None,
        PgReceivewal("pg_receivewal --synchronous", ("--synchronous",)),
        Anywhen(" ".join(("anywhen stream", *flags)), flags),
    ]


def add_arguments(group):
    group.add_argument("--clients", default="1,8,32", metavar="N,N", help="how many commit at once [1,8,32]")
    group.add_argument("--seconds", type=int, default=10, metavar="S", help="for each tool and number of clients [10]")
    group.add_argument("--server-fsync", choices=["on", "off"], default="on", help="whether the server syncs too [on]")


def run(options, programs, folder):
    asked = [int(number) for number in options.clients.split(",")]
    every = [tool for tool in tools(programs) if tool is None or tool in chosen([tool], options.only)]
    runs = []
    with Server(programs, folder / "sync", settings=f"fsync = {options.server_fsync}") as server:
        server.sql("create table commits (id bigserial primary key, client int, note text)")
        for round_ in range(options.rounds):
            turn = round_ % len(every)
            for tool in every[turn:] + every[:turn]:
                for clients in asked:
                    figures = commit(tool, programs, server, folder / "work", clients, options.seconds)
                    runs.append({"tool": name_of(tool), "round": round_, "clients": clients, **figures})
    report(every, asked, runs)
    return {"server_fsync": options.server_fsync, "runs": runs}


def name_of(tool):
    return tool.name if tool else "no synchronous standby"


def commit(tool, programs, server, work, clients, seconds):
    """Commits for so long; with `tool` as the synchronous standby, if one is given."""
    if tool is None:
        return pgbench(server, work, clients, seconds)
    server.sql("select pg_create_physical_replication_slot('bench', true)")
    try:
        with Receiving(tool, programs, server, "bench", work.with_name("received")) as receiving, \
                server.session() as session:
            state = "select sync_state from pg_stat_replication"
            wait_until("the tool streams", lambda: session.ask(state) != "", receiving)
            # once it has caught up: what it acknowledges first is not what is measured
            server.set(synchronous_standby_names="*")
            wait_until("the tool is the standby", lambda: session.ask(state) == "sync", receiving)
            pgbench(server, work, clients, 1)
            before = receiving.cpu_seconds()
            figures = pgbench(server, work, clients, seconds)
            receiving.must_run()
            if session.ask(state) != "sync":
                raise RuntimeError(f"{tool.name} was not the synchronous standby at the end")
            figures["cpu_seconds"] = receiving.cpu_seconds() - before
            figures["peak_mib"] = receiving.peak_mib()
            server.set(synchronous_standby_names="")
    finally:
        server.set(synchronous_standby_names="")
        drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots where not active"
        wait_until("the slot is free", lambda: server.sql(drop) is not None and
                   server.sql("select count(*) from pg_replication_slots") == "0")
    return figures


def pgbench(server, work, clients, seconds):
    """Commits for so long; how many each second, and the milliseconds that they took."""
    make_folder(work)
    try:
        script = work / "script.sql"
        script.write_text(SCRIPT)
        script.chmod(0o644)
        server.pgbench("-n", "-M", "prepared", "-c", clients, "-j", min(clients, 2), "-T", seconds, "-f", script,
                       "-l", f"--log-prefix={work}/log")
        # client, number, microseconds, script, and when it ended, see pgbench(1)
        lines = [line.split() for log in work.glob("log.*") for line in log.read_text().splitlines()]
    finally:
        shutil.rmtree(work)
    return {"per_second": len(lines) / seconds, "ms": distribution([int(line[2]) / 1000 for line in lines])}


def report(every, asked, runs):
    rows = []
    for clients in asked:
        peer = None
        for tool in every:
            own = [run for run in runs if run["tool"] == name_of(tool) and run["clients"] == clients]
            rates = [run["per_second"] for run in own]
            if isinstance(tool, PgReceivewal):
                peer = median(rates)
            rows.append([
                clients,
                name_of(tool),
                spread(rates),
                f"{median(rates) / peer:.2f}" if tool and peer else "",
                *(spread([run["ms"][part] for run in own], 2) for part in ["p50", "p99", "max"]),
            ])
    print_table(["clients", "tool", "commits/s", "of peer", "p50 ms", "p99 ms", "max ms"], rows)
