"""The programs that are measured, and as whom they run."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Programs:
    pg_bin: Path
    anywhen: Path

    @classmethod
    def find(cls, pg_bin, anywhen):
        if not anywhen.is_file():
            sys.exit(f"bench: no program at {anywhen}\n  hint: cargo build --release, or --anywhen PATH")
        return cls(pg_bin or newest_release(), anywhen.resolve())

    def settle_in(self, folder):
        """Makes `folder` usable for the account of the servers, and copies the program there: so a build
        meanwhile changes nothing, and the account needs no right to the target folder."""
        copied = folder / "anywhen"
        shutil.copy(self.anywhen, copied)
        copied.chmod(0o755)
        give_away(folder)
        return replace(self, anywhen=copied)

    def pg(self, name):
        return str(self.pg_bin / name)

    def pg_version(self):
        said = subprocess.run([self.pg("postgres"), "--version"], capture_output=True, text=True, check=True).stdout
        return said.split(") ", 1)[-1].split()[0]

    def pg_major(self):
        return int(re.match(r"\d+", self.pg_version())[0])

    def pg_build_has(self, what):
        """What configure was asked for; a build that does not say so is taken not to have it."""
        configured = subprocess.run([self.pg("pg_config"), "--configure"], capture_output=True, text=True, check=False)
        return f"--with-{what}" in configured.stdout

    def anywhen_version(self):
        return subprocess.run([self.anywhen, "--version"], capture_output=True, text=True, check=True).stdout.strip()

    def stream_takes(self, flag):
        said = subprocess.run([self.anywhen, "stream", "--help"], capture_output=True, text=True, check=True).stdout
        return re.search(rf"^\s+{re.escape(flag)}\b", said, re.MULTILINE) is not None


def newest_release():
    """The newest major that is released; one that is not only where there is no other."""
    roots = [os.environ.get("ANYWHEN_PG_DIR"), "/usr/lib/postgresql"]
    found = []
    for bin_dir in (path for root in roots if root for path in Path(root).glob("*/bin")):
        needed = ["initdb", "postgres", "psql", "pgbench", "pg_receivewal"]
        if not all((bin_dir / name).exists() for name in needed):
            continue
        said = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=False).stdout
        if number := re.search(r"\) (\d+)(\S*)", said):
            released = not re.search("devel|beta|rc", number[2])
            found.append((released, int(number[1]), str(bin_dir)))
    if not found:
        sys.exit("bench: no PostgreSQL with pgbench and pg_receivewal\n  hint: --pg-bin DIR, or set $ANYWHEN_PG_DIR")
    return Path(max(found)[2])


def account():
    """PostgreSQL refuses to run as root: then everything that is measured runs as its account."""
    if os.geteuid() != 0:
        return {}
    return {"user": "postgres", "group": "postgres", "extra_groups": []}


def give_away(path):
    if os.geteuid() == 0:
        shutil.chown(path, "postgres", "postgres")


def make_folder(path):
    path.mkdir(parents=True)
    give_away(path)
    return path
