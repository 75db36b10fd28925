"""A PostgreSQL server in a folder of its own, on a free port of 127.0.0.1."""

import os
import signal
import socket
import subprocess
import threading
import time

from .programs import account, make_folder

PATIENCE_SECONDS = 120

SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = '{sockets}'
port = {port}
max_connections = 100
max_wal_senders = 20
max_replication_slots = {slots}
wal_level = replica
shared_buffers = 512MB
max_wal_size = 32GB
checkpoint_timeout = 1h
autovacuum = off
"""


class Server:
    """Started when made; stopped at the end of the `with` block."""

    def __init__(self, programs, folder, segment_mib=16, slots=100, settings=""):
        self.programs = programs
        self.folder = make_folder(folder)
        self.data = folder / "data"
        self.port = free_port()
        self.segment_bytes = segment_mib * 2**20
        self._check([programs.pg("initdb"), "-D", self.data, "-U", "postgres", "--auth=trust", "--no-sync",
                     f"--wal-segsize={segment_mib}"])
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write(SETTINGS.format(sockets=folder, port=self.port, slots=slots) + settings + "\n")
        self.log = open(folder / "log", "wb")
        self.process = subprocess.Popen([programs.pg("postgres"), "-D", self.data], stdout=self.log, stderr=self.log,
                                        cwd=folder, start_new_session=True, **account())
        self._wait_until_it_answers()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait()
        self.log.close()

    @property
    def conninfo(self):
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    def sql(self, text):
        """What one command answers, as text."""
        return self._check([self.programs.pg("psql"), "-XAtqc", text, "-d", self.conninfo]).strip()

    def pgbench(self, *flags):
        connection = ["-h", "127.0.0.1", "-p", self.port, "-U", "postgres"]
        return self._check([self.programs.pg("pgbench"), *connection, *flags, "postgres"])

    def set(self, **settings):
        for name, value in settings.items():
            self.sql(f"alter system set {name} = '{value}'")
        self.sql("select pg_reload_conf()")

    def session(self):
        return Session(self)

    def _check(self, command):
        command = [str(part) for part in command]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False, **account())
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def _wait_until_it_answers(self):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.sql("select 1")
                return
            except RuntimeError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log = (self.folder / "log").read_text(errors="replace")
                    raise RuntimeError(f"the server did not start:\n{log}") from None
                time.sleep(0.05)


class Session:
    """A connection that stays: a question costs no new process."""

    def __init__(self, server):
        self._psql = subprocess.Popen([server.programs.pg("psql"), "-XAtq", "-d", server.conninfo],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                                      cwd=server.folder, **account())
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._psql.stdin.close()
        self._psql.wait(10)

    def ask(self, text):
        """The one value that `text`, a query without its semicolon, answers; empty where there is none."""
        with self._lock:
            self._psql.stdin.write(f"{text};\n\\echo .\n")
            self._psql.stdin.flush()
            answer = ""
            for line in self._psql.stdout:
                if line == ".\n":
                    return answer
                answer = line.rstrip("\n")
        raise RuntimeError("psql ended")


def lsn_number(text):
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def lsn_text(number):
    return f"{number >> 32:X}/{number & 0xFFFFFFFF:X}"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stored_bytes(folder):
    """The lengths of all files below `folder`, and how many there are."""
    files = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return sum(os.path.getsize(file) for file in files), len(files)
