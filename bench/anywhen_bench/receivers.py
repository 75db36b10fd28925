"""The tools that receive WAL, each set as its documentation says for a careful archive: everything is synced."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

from .machine import peak_mib, process_seconds
from .programs import account, make_folder

PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class PgReceivewal:
    """PostgreSQL's own receiver, into a local folder."""

    name: str
    flags: tuple = ()
    #: as application_name
    label: str = "pg_receivewal"

    def command(self, programs, server, slot, folder, end=None):
        until = ["--endpos", end, "--no-loop"] if end else []
        return [programs.pg("pg_receivewal"), "-D", folder, "-S", slot, *self.flags, *until,
                "-d", f"{server.conninfo} application_name={self.label}"]

    #: stops by itself where it was told to
    stops_at_end = True


@dataclass(frozen=True)
class Anywhen:
    """`anywhen stream`, into a local repository."""

    name: str
    flags: tuple = ()
    #: whether the flags name a configuration file, which names the repository
    configured: bool = False
    label: str = "anywhen"

    def command(self, programs, server, slot, folder, end=None):
        del end
        repo = [] if self.configured else ["--repo", f"file://{folder}"]
        return [programs.anywhen, "stream", *repo, "--slot", slot, *self.flags,
                "-d", f"{server.conninfo} application_name={self.label}"]

    stops_at_end = False


class Receiving:
    """One run of a tool, from an empty folder. Stopped, and the folder removed, at the end of the `with` block."""

    def __init__(self, tool, programs, server, slot, folder, end=None, environment=None):
        self.folder = make_folder(folder)
        self.said = open(folder.with_suffix(".said"), "w+b")
        command = [str(part) for part in tool.command(programs, server, slot, folder, end)]
        # its own environment: settings of whoever measures must not change what is measured
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **(environment or {})}
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=self.said, stderr=self.said, cwd="/", env=environment,
                                        start_new_session=True, **account())
        self._peak_mib = 0.0
        self._cpu_seconds = None

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if self.runs():
            self.stop()
        if failed:
            print(f"what the tool said:\n{self.what_it_said()}")
        self.said.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def runs(self):
        """Looks at its memory too: call it often."""
        if self.process.returncode is not None:
            return False
        self._peak_mib = max(self._peak_mib, peak_mib(self.process.pid) or 0.0)
        # not Popen.poll: the kernel tells what the process used only once
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return True
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self._cpu_seconds = usage.ru_utime + usage.ru_stime
        return False

    def must_run(self):
        if not self.runs():
            raise RuntimeError(f"the tool ended with {self.process.returncode}:\n{self.what_it_said()}")

    def cpu_seconds(self):
        """Of the tool alone, until now or until it ended."""
        if self.runs():
            return process_seconds(self.process.pid)
        return self._cpu_seconds

    def peak_mib(self):
        self.runs()
        return self._peak_mib

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while self.runs():
            if time.monotonic() > deadline:
                self.process.kill()
            time.sleep(0.02)

    def what_it_said(self):
        self.said.flush()
        self.said.seek(0)
        return self.said.read().decode(errors="replace").strip()


def wait_until(what, condition, receiving=None, every=0.02):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if receiving:
            receiving.must_run()
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain until {what}")
        time.sleep(every)


def chosen(tools, only):
    """Those of `tools` whose names contain one of the words of `only`."""
    words = only.split(",") if only else [""]
    return [tool for tool in tools if any(word in tool.name for word in words)]
