"""What a stream asks of an S3 store while little or nothing happens, and what that costs."""

import time
from pathlib import Path

from .figures import print_table
from .programs import make_folder
from .receivers import Anywhen, Receiving
from .s3_endpoint import CREDENTIALS, Endpoint, program
from .server import Server, stored_bytes

DAY_SECONDS = 86_400
MONTH_DAYS = 30

# S3 Standard, us-east-1, per https://aws.amazon.com/s3/pricing/; deletes are free
DOLLARS_PER_WRITE = 0.005 / 1000  # PUT, COPY, POST, LIST
DOLLARS_PER_READ = 0.0004 / 1000  # GET, HEAD and all others
DOLLARS_PER_GB_MONTH = 0.023

# of PostgreSQL: what its own work costs belongs to an idle server (archive_timeout is 0, as always here)
DEFAULTS = """
checkpoint_timeout = 5min
autovacuum = on
"""

CONFIG = """
[repository.bench]
url = "s3://bench/main"
endpoint = "{endpoint}"
allow_http = true
[cluster.main]
repositories = ["bench"]
"""


def add_arguments(group):
    group.add_argument("--minutes", type=float, default=5, metavar="M", help="for each of idle and lightly busy [5]")
    group.add_argument("--s3-endpoint", type=Path, metavar="PATH",
                       help="the endpoint of the tests [examples/s3_endpoint beside anywhen]: "
                            "cargo build --release --example s3_endpoint")


def run(options, programs, folder):
    program(options)  # missed now, rather than later
    runs = []
    for name, commits_per_second in [("idle", 0), ("1 commit/s", 1)]:
        buckets = make_folder(folder / f"store-{commits_per_second}")
        make_folder(buckets / "bench")
        with Server(programs, folder / f"idle-{commits_per_second}", settings=DEFAULTS) as server, \
                Endpoint(options, buckets) as store:
            watched = watch(options, programs, folder, server, (store, buckets), commits_per_second)
            runs.append({"server": name, **watched})
    report(runs)
    return {"runs": runs}


def watch(options, programs, folder, server, place, commits_per_second):
    store, buckets = place
    server.sql("create table commits (id bigserial primary key, note text)")
    # what happened until now is not what an idle server does; a full segment begins anew
    server.sql("select pg_switch_wal()")
    server.sql("checkpoint")
    config = folder / "s3.toml"
    config.write_text(CONFIG.format(endpoint=store.address))
    config.chmod(0o644)
    tool = Anywhen("anywhen stream", ("--config", str(config)), configured=True)
    with Receiving(tool, programs, server, "bench", folder / "received", environment=CREDENTIALS) as receiving, \
            server.session() as session:
        go_on(receiving, session, commits_per_second, 30)
        before, kept = store.counts(), stored_bytes(buckets)[0]
        cpu = receiving.cpu_seconds()
        seconds = options.minutes * 60
        go_on(receiving, session, commits_per_second, seconds)
        after = store.counts()
        figures = {name: (after[name] - before[name]) / seconds * DAY_SECONDS for name in after}
        figures["kept_bytes"] = (stored_bytes(buckets)[0] - kept) / seconds * DAY_SECONDS
        figures["cpu_seconds"] = (receiving.cpu_seconds() - cpu) / seconds * DAY_SECONDS
        figures["peak_mib"] = receiving.peak_mib()
    return figures


def go_on(receiving, session, commits_per_second, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        receiving.must_run()
        if commits_per_second:
            session.ask("insert into commits (note) values ('now and then')")
        time.sleep(1 / (commits_per_second or 1))


def dollars_per_month(figures):
    """Requests of a month, and keeping for a month what one month stored."""
    writes = figures["puts"] + figures["posts"] + figures["lists"]
    reads = figures["gets"] + figures["heads"]
    requests = writes * DOLLARS_PER_WRITE + reads * DOLLARS_PER_READ
    kept = figures["kept_bytes"] / 1e9 * MONTH_DAYS * DOLLARS_PER_GB_MONTH
    return requests * MONTH_DAYS + kept


def report(runs):
    rows = []
    for figures in runs:
        counts = [f"{figures[name]:.0f}" for name in ["puts", "gets", "heads", "lists", "deletes", "posts"]]
        rows.append([figures["server"], *counts, f"{figures['put_bytes'] / 1e6:.1f}", f"{figures['kept_bytes'] / 1e6:.1f}",
                     f"{dollars_per_month(figures):.2f}", f"{figures['cpu_seconds']:.0f}", f"{figures['peak_mib']:.0f}"])
    print("a day:")
    print_table(["server", "puts", "gets", "heads", "lists", "deletes", "posts", "MB sent", "MB kept", "$/month",
                 "CPU s", "peak MiB"], rows)
