"""What the machine is, and what its processors did."""

import os
import time

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def describe_machine(programs, folder):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "anywhen": programs.anywhen_version(),
        "postgresql": programs.pg_version(),
        "machine": f"{os.cpu_count()} x {model}, {memory:.0f} GiB",
        "fdatasync of 8 KiB": f"{sync_microseconds(folder):.0f} us",
        "load at the beginning": f"{os.getloadavg()[0]:.1f}",
    }


def sync_microseconds(folder, times=200):
    """The median of an append and fdatasync: what a commit costs at least on this disk."""
    took = []
    path = folder / "sync-probe"
    with open(path, "wb", buffering=0) as file:
        for _ in range(times):
            begun = time.perf_counter()
            file.write(bytes(8192))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - begun)
    path.unlink()
    return sorted(took)[times // 2] * 1e6


def write_seconds(folder, size):
    """What writing so many bytes to one file and syncing it takes: no restore of as many can be faster on this disk."""
    path = folder / "write-probe"
    stretch = os.urandom(1 << 20)
    os.sync()
    begun = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(stretch)
        os.fsync(file.fileno())
    took = time.perf_counter() - begun
    path.unlink()
    return took


def busy_seconds():
    """Processor seconds that the whole machine spent on anything since it started."""
    with open("/proc/stat", encoding="utf-8") as file:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / CLOCK_TICKS


def family_seconds(parent):
    """Processor seconds of a process and its children, those that have ended included."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := stat_fields(name)) and (int(name) == parent or int(fields[1]) == parent):
            # utime, stime and those of the children that were waited for, see proc(5)
            total += sum(map(int, fields[11:15]))
    return total / CLOCK_TICKS


def process_seconds(pid):
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS if fields else 0.0


def stat_fields(pid):
    """The fields of /proc/PID/stat from `state` on; none where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def peak_mib(pid):
    """The most memory that the process has had resident so far; none where it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            found = [line.split()[1] for line in file if line.startswith("VmHWM:")]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(found[0]) / 1024 if found else None
