"""How long recovery takes with WAL that `wal-fetch` brings, beside other ways and the same WAL lying in pg_wal."""

import os
import shutil
import subprocess
import sys
import time

from .figures import median, print_table, spread
from .pgbackrest import stanza
from .programs import account, give_away, make_folder
from .receivers import Anywhen, Receiving, wait_until
from .s3_endpoint import Endpoint, program
from .server import Server
from .year import ask, lag

#: a server that replays: it may not write elsewhere, and nobody connects
SETTINGS = {"listen_addresses": "", "fsync": "off", "autovacuum": "off", "max_wal_size": "32GB",
            "checkpoint_timeout": "1h", "logging_collector": "off"}


def add_arguments(group):
    group.add_argument("--wal-segments", type=int, default=64, metavar="N", help="segments of 16 MiB to replay [64]")


def run(options, programs, folder):
    program(options)  # missed now, rather than later
    buckets = make_folder(folder / "replay")
    repository = buckets / "replay"
    repo = ["--repo", f"file://{repository}"]
    with Server(programs, folder / "primary", settings="fsync = off\nwal_keep_size = '64GB'") as server:
        tool = Anywhen("anywhen stream", tuple(repo), configured=True)
        with Receiving(tool, programs, server, "replay", folder / "received") as receiving:
            fill(options, programs, server, receiving, repo)
        plain = keep_plain(server.data / "pg_wal", repository, make_folder(folder / "plain"))
        archive = PgBackRest(make_folder(folder / "pgbackrest"), folder / "restored")
        has_archive = archive.take(server, plain)
    runs = []
    with Endpoint(options, buckets, options.slow_ms) as endpoint:
        ways = {
            "in pg_wal": (repo, {}, "/bin/false"),
            "cp": (repo, {}, f"cp {plain}/%f %p"),
            "wal-fetch": (repo, {}, None),
            "wal-fetch --no-ahead": (repo, {}, "--no-ahead"),
            "wal-fetch over S3": (["--repo", "s3://replay"], endpoint.environment(), None),
        }
        if has_archive:
            ways["pgbackrest"] = (repo, {}, archive.restore_command())
        for number in range(options.rounds):
            names = list(ways)
            for name in names[number % len(names):] + names[:number % len(names)]:
                repo, environment, command = ways[name]
                data = folder / "restored"
                shutil.rmtree(data, ignore_errors=True)
                ask(programs, ["restore", *repo, "-D", str(data), "--action", "shutdown", "--quiet"], environment)
                set_up(data, command)
                if name == "in pg_wal":
                    put_in_place(plain, data / "pg_wal")
                archive.clear()
                runs.append({"wal": name, "seconds": replay(programs, data, environment)})
                print(f"{name}: {runs[-1]['seconds']:.2f} s", flush=True)
    one_by_one = [{"ahead": ahead, "ms": each(programs, folder, repository, plain, ahead)}
                  for _ in range(options.rounds) for ahead in (True, False)]
    report(runs, one_by_one)
    return {"runs": runs, "one_by_one": one_by_one}


def fill(options, programs, server, receiving, repo):
    server.pgbench("-i", "-s", "40", "--quiet")
    ask(programs, ["backup", *repo, "-d", server.conninfo, "--quiet"], {})
    start = server.sql("select pg_current_wal_lsn()")
    while int(server.sql(f"select (pg_current_wal_lsn() - '{start}')::bigint")) < options.wal_segments * 16 * 2**20:
        receiving.must_run()
        server.pgbench("-c", "8", "-j", "2", "-t", "2000", "-N")
    server.sql("select pg_switch_wal()")
    wait_until("all is stored", lambda: lag(server) == 0, receiving)


def keep_plain(wal, repository, plain):
    """The segments that are stored whole."""
    for path in sorted(wal.iterdir()):
        if list(repository.glob(f"*/*/wal/*/*/{path.name}")):
            put(path, plain / path.name)
    return plain


class PgBackRest:
    """A local repository with zstd, and its archive-get as the manual recommends it: asynchronous, by two processes."""

    def __init__(self, folder, restored):
        self.folder = folder
        self.restored = restored

    def take(self, server, plain):
        """Archives segments; whether that can be done here."""
        if not shutil.which("pgbackrest"):
            print("without pgbackrest: it is not installed")
            return False
        config = self.folder / "pgbackrest.conf"
        config.write_text(f"""
[global]
repo1-path={self.folder / 'repository'}
log-path={self.folder}
lock-path={self.folder / 'lock'}
spool-path={self.folder / 'spool'}
log-level-console=error
log-level-file=off
compress-type=zst
process-max=2
{stanza(server)}""")
        give_away(config)
        try:
            self._call("stanza-create", check=True)
        except subprocess.CalledProcessError as error:
            print(f"without pgbackrest: {error.stdout.decode(errors='replace').strip()}")
            return False
        for path in sorted(plain.iterdir()):
            self._call("archive-push", str(path), check=True)
        return True

    def restore_command(self):
        flags = f"--config={self.folder / 'pgbackrest.conf'} --stanza=main --pg1-path={self.restored} --archive-async"
        return f'/usr/bin/pgbackrest {flags} archive-get %f "%p"'

    def clear(self):
        """Ends what fetches ahead, and takes away what it has fetched."""
        if (self.folder / "pgbackrest.conf").exists():
            self._call("stop", "--force", check=False)
            self._call("start", check=False)
            shutil.rmtree(self.folder / "spool", ignore_errors=True)

    def _call(self, *command, check):
        program = ["/usr/bin/pgbackrest", f"--config={self.folder / 'pgbackrest.conf'}", "--stanza=main", *command]
        subprocess.run(program, check=check, cwd="/", env={"PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, **account())


def put_in_place(plain, wal):
    for path in plain.iterdir():
        put(path, wal / path.name)


def put(source, target):
    shutil.copy(source, target)
    give_away(target)


def set_up(data, command):
    """Replaces the restore command, or adds a flag to it."""
    path = data / "postgresql.auto.conf"
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("restore_command")]
    [own] = [line for line in lines if line.startswith("restore_command")]
    if command == "--no-ahead":
        own = own.replace(" wal-fetch ", " wal-fetch --no-ahead ")
    elif command:
        own = f"restore_command = '{command}'"
    path.write_text("\n".join([*kept, own]) + "\n", encoding="utf-8")


def replay(programs, data, environment):
    """Seconds from the server's start until it has shut down at the target, its shutdown included."""
    settings = [flag for name, value in SETTINGS.items() for flag in ("-c", f"{name}={value}")]
    os.sync()
    log = data.with_suffix(".log")
    with open(log, "wb") as said:
        begun = time.perf_counter()
        command = [programs.pg("postgres"), "-D", str(data), "-c", f"unix_socket_directories={data.parent}", *settings]
        subprocess.run(command, stdout=said, stderr=said, cwd=data, check=False,
                       env={"PATH": "/usr/bin:/bin", **environment}, **account())
        seconds = time.perf_counter() - begun
    if b"shutdown at recovery target" not in log.read_bytes():
        raise RuntimeError(f"the server did not come to its target:\n{log.read_text(errors='replace')}")
    return seconds


def each(programs, folder, repository, plain, ahead):
    """Milliseconds for each call of `wal-fetch`, one after another without a server."""
    data = folder / "restored"
    flags = [] if ahead else ["--no-ahead"]
    names = sorted(path.name for path in plain.iterdir())[:64]
    begun = time.perf_counter()
    for name in names:
        command = [str(programs.anywhen), "--repo", f"file://{repository}", "wal-fetch", *flags, name, "pg_wal/RECOVERYXLOG"]
        subprocess.run(command, cwd=data, check=True, env={"PATH": "/usr/bin:/bin"}, **account())
        os.remove(data / "pg_wal" / "RECOVERYXLOG")
    return (time.perf_counter() - begun) / len(names) * 1000


def report(runs, one_by_one):
    rows = []
    base = median([run["seconds"] for run in runs if run["wal"] == "in pg_wal"])
    for name in dict.fromkeys(run["wal"] for run in runs):
        seconds = [run["seconds"] for run in runs if run["wal"] == name]
        rows.append([name, spread(seconds, 2), f"{median(seconds) / base:.2f}"])
    print_table(["WAL", "seconds", "of in pg_wal"], rows)
    for ahead in (True, False):
        own = [call["ms"] for call in one_by_one if call["ahead"] == ahead]
        print(f"one call after another, {'ahead' if ahead else 'not ahead'}: {spread(own, 1)} ms a segment")
