#!/usr/bin/env python3
"""Reads an Anywhen repository without Anywhen, by docs/format.md alone.

    anywhen_reader.py list    REPO
    anywhen_reader.py cat     REPO OBJECT                          the plain bytes of one object, checked
    anywhen_reader.py segment REPO CLUSTER SYSTEM NAME -o FILE     a WAL segment, or NNNNNNNN.history
    anywhen_reader.py file    REPO CLUSTER SYSTEM BACKUP PATH -o FILE
    anywhen_reader.py backup  REPO CLUSTER SYSTEM BACKUP -o DIR    a whole data directory, before replay

REPO is a local folder: a local repository, or a copy of the bucket. An encrypted repository needs
--identity FILE and the `age` command. Exit codes are those that a restore_command needs: 0 found, 1 not
stored, 200 anything else.
"""
import argparse
import base64
import binascii
import json
import os
import re
import struct
import subprocess
import sys
import zlib

try:
    import zstandard
    from blake3 import blake3
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except Exception as error:  # an exit code of 1 would be "not stored"
    print(f"refused: a package of docs/reader/requirements.txt is missing: {error}", file=sys.stderr)
    sys.exit(200)

FORMAT = 1
HEADER_MAGIC = 0x184D2A50
TRAILER_MAGIC = 0x184D2A5E
ZSTD_MAGIC = 0xFD2FB528
SEALED_MAGIC = 0x01594E41
TAIL_MAGIC = b"ANYWHEN\x01"
HEADER_BYTES_MAX = 65536
TRAILER_BYTES_MAX = 16777216
FRAME_PLAIN_BYTES_MAX = 1073741824
WINDOW_BYTES_MAX = 8388608
JOURNAL_MAGIC = b"ANYWJNL\x01"
JOURNAL_VERSION = 2
TAG_BYTES = 16
CODEC = "zstd"
CIPHER = "aes-256-gcm"
KEY_ID_INFO = b"anywhen key id 1"
OBJECT_KEY_INFO = b"anywhen object key 1"
FRAME_NONCE_END = bytes.fromhex("00 00 00 00")
SEAL_NONCE_END = bytes.fromhex("00 00 00 01")


class Refused(Exception):
    """Damage, a key that is missing, or a format that this reader does not know."""


class NotStored(Exception):
    """The repository has no such object."""


def need(condition, message):
    if not condition:
        raise Refused(message)


def parse_json(text, what):
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refused(f"{what} is not JSON: {error}") from error
    need(isinstance(value, dict), f"{what} is not a JSON object")
    need(value.get("format", FORMAT) <= FORMAT, f"{what} has a newer format, upgrade the reader")
    return value


# ------------------------------------------------------------------------------------------ keys


def hkdf(data_key, salt, info, length):
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(data_key)


class Keyring:
    """Data keys by key id, unwrapped with an age identity."""

    def __init__(self, folder, identity):
        self.folder, self.identity, self.known = folder, identity, {}

    def find(self, key_id, wraps):
        if key_id not in self.known:
            need(self.identity, f"encrypted with key {key_id}: --identity FILE is needed")
            need(re.fullmatch(r"[0-9]{8}-[0-9a-f]{32}", key_id), f"not a key id: {key_id!r}")
            stored = os.path.join(self.folder, key_id)
            names = sorted(os.listdir(stored)) if os.path.isdir(stored) else []
            wraps = [read(os.path.join(stored, name)) for name in names] + wraps
            need(wraps, f"key {key_id} is gone: no wrap of it is stored")
            self.known[key_id] = self.unwrap(key_id, wraps)
        return self.known[key_id]

    def unwrap(self, key_id, wraps):
        for wrap in wraps:
            age = ["age", "--decrypt", "--identity", self.identity]
            plain = subprocess.run(age, input=wrap, capture_output=True).stdout
            if not re.fullmatch(rb"[0-9a-f]{64}\n", plain):
                continue
            data_key = bytes.fromhex(plain.decode())
            if key_id.endswith("-" + hkdf(data_key, b"", KEY_ID_INFO, 16).hex()):
                return data_key
        raise Refused(f"none of the {len(wraps)} wraps of key {key_id} opens with this identity")


# -------------------------------------------------------------------------------- the container


def unzstd(stored):
    """The plain bytes of the zstd frame that `stored` begins with, and the frame's length."""
    need(len(stored) >= 5 and struct.unpack_from("<I", stored)[0] == ZSTD_MAGIC, "not a zstd frame")
    try:
        claimed = zstandard.get_frame_parameters(stored[:18])
        need(claimed.has_checksum, "zstd frame has no checksum")
        need(claimed.content_size <= FRAME_PLAIN_BYTES_MAX, "zstd frame has no size, or is too large")
        frame = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX).decompressobj()
        parts, at = [], 0
        while not frame.eof:
            need(at < len(stored), "zstd frame is cut short")
            parts.append(frame.decompress(stored[at : at + 65536]))
            at += len(stored[at : at + 65536])
    except zstandard.ZstdError as error:
        raise Refused(f"zstd: {error}") from error
    plain = b"".join(parts)
    need(len(plain) == claimed.content_size, "zstd frame has another length than it says")
    return plain, at - len(frame.unused_data)


class Object:
    """An object whose header is known: decodes its frames, together or one by one."""

    def __init__(self, prefix, path, keyring, accept_plain):
        need(len(prefix) >= 8, "object is cut short")
        magic, length = struct.unpack_from("<II", prefix)
        need(magic == HEADER_MAGIC, "not an object of this format")
        need(length <= HEADER_BYTES_MAX and len(prefix) >= 8 + length, "header is cut short")
        self.header_frame = bytes(prefix[: 8 + length])
        self.header = parse_json(self.header_frame[8:], "header")
        own = f'{self.header["cluster"]}/{self.header["system_id"]}/{self.header["name"]}'
        need(own == path, f"it says that it is another object: {own}")
        need(self.header["codec"] == CODEC, "unknown codec, upgrade the reader")
        need(self.header.get("digest_of", "frames") == "frames", "unknown digest, upgrade the reader")
        self.aead, key_id = None, self.header.get("key")
        if key_id is None:
            need(accept_plain, "not encrypted, though an identity was given (--accept-plain reads it)")
            need(not {"cipher", "salt", "wraps"} & set(self.header), "header has no key")
            return
        need(self.header.get("cipher") == CIPHER, "unknown cipher, upgrade the reader")
        salt = bytes.fromhex(self.header["salt"])
        need(len(salt) == 32, "salt has not 32 bytes")
        wraps = [base64.b64decode(wrap, validate=True) for wrap in self.header.get("wraps", [])]
        data_key = keyring.find(key_id, wraps)
        self.aead = AESGCM(hkdf(data_key, salt, OBJECT_KEY_INFO, 32))

    def open_sealed(self, offset, nonce_end, sealed, associated):
        try:
            return self.aead.decrypt(struct.pack(">Q", offset) + nonce_end, bytes(sealed), associated)
        except InvalidTag as error:
            raise Refused(f"not what was sealed: byte {offset}") from error

    def frame(self, offset, stored):
        """The plain bytes of the frame at `offset` of the object, and its stored length."""
        if self.aead is None:
            return unzstd(stored)
        need(len(stored) >= 8, "sealed frame is cut short")
        magic, length = struct.unpack_from("<II", stored)
        need(magic == SEALED_MAGIC and 8 + length <= len(stored), f"no sealed frame at byte {offset}")
        sealed = stored[8 : 8 + length]
        frame = self.open_sealed(offset, FRAME_NONCE_END, sealed, self.header_frame)
        plain, used = unzstd(memoryview(frame))
        need(used == len(frame), "sealed frame holds more than one zstd frame")
        return plain, 8 + length

    def whole(self, data):
        """All plain bytes and the trailer, checked from the first byte to the last."""
        need(len(data) >= 16 and data[-8:] == TAIL_MAGIC, "object does not end with a trailer")
        length, json_crc32 = struct.unpack_from("<II", data, len(data) - 16)
        seal_bytes = TAG_BYTES if self.aead else 0
        payload = seal_bytes + length + 16
        start = len(data) - 8 - payload
        need(length <= TRAILER_BYTES_MAX and start >= len(self.header_frame), "trailer is too long")
        need(struct.unpack_from("<II", data, start) == (TRAILER_MAGIC, payload), "no trailer frame")
        text = bytes(data[len(data) - 16 - length : len(data) - 16])
        need(zlib.crc32(text) == json_crc32, "trailer is damaged")
        trailer = parse_json(text, "trailer")
        need(zlib.crc32(data[:start]) == trailer["stored_crc32"], "stored bytes are damaged")
        if self.aead:
            seal = data[start + 8 : start + 8 + seal_bytes]
            self.open_sealed(start, SEAL_NONCE_END, seal, self.header_frame + text)
        parts, at = [], len(self.header_frame)
        while at < start:
            plain, used = self.frame(at, data[at:start])
            parts.append(plain)
            at += used
        plain = b"".join(parts)
        need(len(plain) == trailer["plain_bytes"], "plain bytes are not as many as were written")
        digested = plain
        if "digest_of" in self.header:
            digested = b"".join(blake3(part).digest() for part in parts)
        need("blake3:" + blake3(digested).hexdigest() == trailer["digest"], "plain bytes are damaged")
        return plain, trailer


# ----------------------------------------------------------------------------------- the journal


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def crc32c_of(byte):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


CRC32C = [crc32c_of(byte) for byte in range(256)]


def is_whole(data):
    """Whether an object's own checksums agree, sealed or not."""
    for seal_bytes in (0, TAG_BYTES):
        try:
            length, crc, magic = struct.unpack("<II8s", data[-16:])
            trailer, frame = data[-16 - length : -16], len(data) - 24 - length - seal_bytes
            if (
                (magic, zlib.crc32(trailer)) == (TAIL_MAGIC, crc)
                and frame > 0
                and struct.unpack_from("<I", data, frame)[0] == TRAILER_MAGIC
                and zlib.crc32(data[:frame]) == json.loads(trailer)["stored_crc32"]
            ):
                return True
        except (struct.error, ValueError, KeyError, TypeError):
            pass
    return False


def frames_of(salt, half):
    """The frames of a half's newest filling: epoch, sequence, synced before, kind, path, object."""
    head = struct.Struct("<8sIHHIQQQ")
    found, at = [], half.find(JOURNAL_MAGIC)
    while at >= 0:
        step = 1
        if at % 8 == 0 and len(half) - at >= head.size:
            _, crc, kind, path, length, epoch, sequence, mark = head.unpack_from(half, at)
            start = at + head.size
            end = start + path + length
            if end <= len(half) and crc32c(salt + half[at + 12 : end]) == crc:
                name, object_ = half[start : start + path].decode(), half[start + path : end]
                found.append((epoch, sequence, mark, kind, name, object_))
                step = end - at
        at = half.find(JOURNAL_MAGIC, at + step)
    newest = max((frame[0] for frame in found), default=0)
    return [frame for frame in found if frame[0] == newest]


def meant(runs):
    """The epochs and sequences of the frames that runs name."""
    for epoch, first, count in struct.iter_unpack("<QQQ", runs[: len(runs) // 24 * 24]):
        yield from ((epoch, first + number) for number in range(min(count, 1 << 20)))


class Journals:
    """What is in journals, played back in memory: the folder is not changed. Read before files are listed:
    what leaves the journal of a writer that lives has a file then, or is in another object."""

    def __init__(self, folder):
        self.put, self.gone = {}, {}
        place = os.path.join(folder, ".journal")
        for name in sorted(os.listdir(place)) if os.path.isdir(place) else []:
            version = re.fullmatch(r"([0-9]+)-[0-9a-f]{16}", name)
            if not version:
                continue
            need(int(version[1]) <= JOURNAL_VERSION, f".journal/{name} is of a later version")
            try:
                # what is removed while we read may be superseded by what we have not seen: only what
                # was removed before is gone
                before, data = (read(os.path.join(place, name)) for _ in range(2))
            except NotStored:
                continue  # its writer has ended since
            self.play_back(name, int(name[-16:], 16).to_bytes(8, "little"), before, data)

    def play_back(self, name, salt, before, data):
        middle, frames = len(data) // 2, {}
        halves = [frames_of(salt, data[:middle]), frames_of(salt, data[middle:])]
        if before != data:
            known = frames_of(salt, before[:middle]) + frames_of(salt, before[middle:])
            known = {frame[:2] for frame in known if frame[3] in (2, 4)}
            halves = [[it for it in half if it[3] not in (2, 4) or it[:2] in known] for half in halves]
        safe = {mark for half in halves for _, _, mark, kind, _, _ in half if kind == 3}
        for half in sorted(half for half in halves if half and half[0][0] not in safe):
            synced = max((mark for _, _, mark, kind, _, _ in half if kind != 3), default=0)
            lost = synced - sum(sequence < synced for _, sequence, *_ in half)
            if lost > 0 and before == data:
                say(f".journal/{name} is damaged: {lost} of its objects or removals are lost")
            for epoch, sequence, _, kind, path, object_ in half:
                if kind == 1:
                    self.gone.pop(path, None)
                    self.put[path] = object_
                    frames[epoch, sequence] = path
                elif kind == 2 and path in self.put:
                    self.gone[path] = self.put.pop(path)
                elif kind == 4:
                    for path in {frames.get(frame) for frame in meant(object_)} & self.put.keys():
                        self.gone[path] = self.put.pop(path)

    def mend(self, path, data):
        """The object that was found, or None, put right."""
        said = self.put.get(path, self.gone.get(path))
        if said is None or data is not None and (len(data) > len(said) or is_whole(data)):
            return data
        return self.put.get(path)

    def names(self, path):
        prefix = f"{path}/"
        return {name[len(prefix) :].split("/")[0] for name in self.put if name.startswith(prefix)}


# ------------------------------------------------------------------------------- the repository


def read(path, offset=0, length=-1):
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotStored(path) from error


class Repository:
    def __init__(self, folder, identity, accept_plain):
        self.folder, self.keyring = folder, Keyring(os.path.join(folder, "keys"), identity)
        self.accept_plain, self.packs = accept_plain or identity is None, {}
        self.journals = Journals(folder)

    def at(self, path):
        need(all(part not in ("", ".", "..") for part in path.split("/")), f"not a path: {path!r}")
        return os.path.join(self.folder, *path.split("/"))

    def names(self, path):
        place = self.at(path)
        there = set(os.listdir(place)) if os.path.isdir(place) else set()
        torn = {name for name in there if f"{path}/{name}" in self.journals.gone}
        kept = {name for name in torn if self.stored(f"{path}/{name}") is not None}
        return sorted((there - torn) | kept | self.journals.names(path))

    def stored(self, path):
        """The bytes of an object, None where it is not stored."""
        try:
            data = read(self.at(path))
        except NotStored:
            data = None
        return self.journals.mend(path, data)

    def object(self, path, prefix):
        return Object(prefix, path, self.keyring, self.accept_plain)

    def fetch(self, path):
        data = self.stored(path)
        if data is None:
            raise NotStored(path)
        return self.decode(path, data)

    def decode(self, path, data):
        """Header, plain bytes and trailer of a whole object."""
        try:
            found = self.object(path, data)
            return found.header, *found.whole(memoryview(data))
        except (Refused, KeyError, TypeError, ValueError, binascii.Error) as error:
            raise Refused(f"{path}: {error!r}") from error

    def record(self, path):
        return parse_json(read(self.at(path)), path)

    # -- WAL

    def stored_wal(self, system, timeline):
        """Segment name to the set of its pieces' ranges; None stands for the whole segment."""
        found = {}
        for folder in self.names(f"{system}/wal/{timeline}"):
            for name in self.names(f"{system}/wal/{timeline}/{folder}"):
                if re.fullmatch(r"[0-9A-F]{24}", name):
                    found.setdefault(name, set()).add(None)
                elif re.fullmatch(r"[0-9A-F]{24}\.pieces", name):
                    found.setdefault(name[:24], set()).update(
                        tuple(int(lsn, 16) for lsn in piece.split("-"))
                        for piece in self.names(f"{system}/wal/{timeline}/{folder}/{name}")
                        if re.fullmatch(r"[0-9A-F]{16}-[0-9A-F]{16}", piece)
                    )
        return found

    def segment(self, system, name):
        """A segment's bytes as far as they are stored, and its full size."""
        path = f"{system}/wal/{name[:8]}/{name[:16]}/{name}"
        try:
            header, plain, trailer = self.fetch(path)
            need(len(plain) == header["segment_bytes"], f"{path} has another length than a segment")
            say_unverified(path, trailer)
            return plain, header["segment_bytes"]
        except NotStored:
            pass
        stored, size = b"", None
        ranges = self.stored_wal(system, name[:8]).get(name, set()) - {None}
        for start, end in sorted(ranges):
            piece = f"{path}.pieces/{start:016X}-{end:016X}"
            try:
                header, plain, trailer = self.fetch(piece)
            except NotStored as error:
                raise Refused(f"{piece}: gone since it was listed, try again") from error
            size = header["segment_bytes"]
            first = (int(name[8:16], 16) << 32) + int(name[16:], 16) * size
            need(len(plain) == end - start and end <= first + size, f"{piece}: wrong length")
            have = start - first
            if have > len(stored):
                break
            known = stored[have : have + len(plain)]
            need(plain[: len(known)] == known, f"{piece}: two histories, it differs from another piece")
            stored += plain[len(known) :]
            say_unverified(piece, trailer)
        return stored, size

    def wal_file(self, system, name):
        if name.endswith(".history"):
            return self.fetch(f"{system}/wal/{name}")[1]
        need(re.fullmatch(r"[0-9A-F]{24}", name), f"not the name of a WAL file: {name!r}")
        stored, size = self.segment(system, name)
        if size is None or len(stored) < size:
            later = [other for other in self.stored_wal(system, name[:8]) if other > name]
            need(not later, f"{name} is missing from byte {len(stored)} on, though {later[:1]} is stored")
        if not stored:
            raise NotStored(name)
        if len(stored) < size:
            say(f"{name}: {len(stored)} of {size} bytes are stored, zeros follow")
        return stored.ljust(size, b"\0")

    # -- backups

    def backup(self, system, backup, names=True):
        """A backup's record; without `names`, what is sealed of it may stay so."""
        path = f"{system}/backups/{backup}/backup.json"
        record = self.record(path)
        digest = record.pop("digest", None)
        content = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        need("blake3:" + blake3(content.encode()).hexdigest() == digest, f"{path} is damaged")
        need("sealed" in record or self.accept_plain, f"{path} is not encrypted (--accept-plain reads it)")
        if "sealed" in record and (names or self.keyring.identity):
            plain = self.decode(path, base64.b64decode(record["sealed"], validate=True))[1]
            clear = {field: value for field, value in record.items() if field != "sealed"}
            record = parse_json(plain, path)
            whole = {field: value for field, value in record.items() if field not in ("damaged_pages", "outside")}
            need(clear == {**whole, "label": "", "tablespaces": []}, f"{path} says other than was sealed")
        return record

    def manifest(self, system, backup):
        """A backup's packs by number, and the other lines of its manifest: kind and content."""
        record = self.backup(system, backup)
        _, plain, trailer = self.fetch(f"{system}/backups/{backup}/manifest")
        need(trailer["digest"] == record["manifest_digest"], "manifest is not that of backup.json")
        lines = manifest_lines(plain)
        for entry in [entry for kind, entry in lines if kind == "files"]:
            need(re.fullmatch(r"backups/[0-9TZ]+[.][0-9]+Z/files/[0-9]{8}", entry["path"]), f'no file list: {entry["path"]}')
            _, plain, trailer = self.fetch(f'{system}/{entry["path"]}')
            need(trailer["digest"] == entry["digest"], f'{entry["path"]} is not that of the manifest')
            lines += manifest_lines(plain)
        packs = {entry["number"]: entry["path"] for kind, entry in lines if kind == "pack"}
        return packs, [(kind, entry) for kind, entry in lines if kind not in ("pack", "files")]

    def content(self, system, packs, file):
        """The bytes of a file, extent by extent."""
        left = file["size"]
        for extent in file["extents"]:
            if isinstance(extent, dict):
                plain = bytes(extent["zeros"])
            else:
                number, offset, stored, plain_bytes, digest = extent
                path = f"{system}/{packs[number]}"
                if path not in self.packs:
                    prefix = read(self.at(path), 0, 8 + HEADER_BYTES_MAX)
                    self.packs[path] = self.object(path, prefix)
                frame = memoryview(read(self.at(path), offset, stored))
                plain, used = self.packs[path].frame(offset, frame)
                whole = (used, len(plain)) == (stored, plain_bytes)
                need(whole and blake3(plain).hexdigest() == digest, f"extent is damaged: {path} {offset}")
            left -= len(plain)
            yield plain
        need(left == 0, "file has another size than its extents")


def say(message):
    print(message, file=sys.stderr)


def say_unverified(path, trailer):
    facts = trailer["facts"]["wal"]
    if not facts["verified"]:
        say(f'{path}: could not be verified from {facts["unverified_from"]} on: {facts["reason"]}')


def manifest_lines(plain):
    """Kind and content of each."""
    lines = [parse_json(line, "manifest line") for line in plain.split(b"\n") if line]
    return [(kind, entry) for line in lines for kind, entry in line.items()]


def disk_path(path):
    """A manifest's path as bytes, which may not lead out of the data directory."""
    raw = bytes.fromhex(path["hex"]) if isinstance(path, dict) else path.encode()
    parts = raw.split(b"/")
    need(all(part not in (b"", b".", b"..") and b"\0" not in part for part in parts), f"bad path {path!r}")
    return raw


# --------------------------------------------------------------------------------- the commands


def list_repository(repository, _):
    for cluster in sorted(os.listdir(repository.folder)):
        if cluster == "keys" or not re.fullmatch(r"[a-z0-9_]{1,40}", cluster):
            continue
        for system_id in repository.names(cluster):
            system = f"{cluster}/{system_id}"
            major = repository.record(f"{system}/cluster.json")["major"]
            print(f"cluster {cluster} system {system_id} PostgreSQL {major}")
            for backup in repository.names(f"{system}/backups"):
                try:
                    record = repository.backup(system, backup, names=False)
                except NotStored:
                    continue  # not finished: it does not exist
                print(
                    f'  backup {backup} timeline {record["timeline"]} {record["start_lsn"]} to '
                    f'{record["stop_lsn"]} finished {record["finished_at"]} "{record["label"]}"'
                )
            for timeline in repository.names(f"{system}/wal"):
                if re.fullmatch(r"[0-9A-F]{8}", timeline):
                    wal = repository.stored_wal(system, timeline) or {"nothing": set()}
                    pieces = sum(len(ranges - {None}) for ranges in wal.values())
                    print(f"  wal timeline {int(timeline, 16)} {min(wal)} to {max(wal)}, {pieces} pieces")
    for key_id in repository.names("keys"):
        print(f'key {key_id} wraps {" ".join(repository.names(f"keys/{key_id}"))}')


def print_object(repository, asked):
    _, plain, _ = repository.fetch(asked.object)
    sys.stdout.buffer.write(plain)


def write_out(path, parts):
    """What is refused half-way must not lie where it was asked for."""
    with open(f"{path}.unfinished", "wb") as out:
        out.writelines(parts)
    os.replace(f"{path}.unfinished", path)


def write_segment(repository, asked):
    write_out(asked.out, [repository.wal_file(asked.system, asked.name)])


def write_file(repository, asked):
    packs, lines = repository.manifest(asked.system, asked.backup)
    for kind, entry in lines:
        is_asked = kind == "outside" and entry["path"] == asked.path
        if is_asked or (kind == "file" and disk_path(entry["path"]) == os.fsencode(asked.path)):
            write_out(asked.out, repository.content(asked.system, packs, entry))
            return
    raise NotStored(asked.path)


def write_backup(repository, asked):
    packs, lines = repository.manifest(asked.system, asked.backup)
    need(not os.path.isdir(asked.out) or not os.listdir(asked.out), f"not empty: {asked.out}")
    root = os.fsencode(f"{asked.out}.unfinished")
    os.makedirs(root, mode=0o700)
    places = dict(mapping.split("=", 1) for mapping in asked.tablespace)
    order = {"link": 0, "directory": 1, "file": 2}  # what lies in a tablespace goes through its link
    lines = [line for line in lines if line[0] in order]  # what lay outside of the data directory stays out
    for kind, entry in sorted(lines, key=lambda line: order[line[0]]):
        path = disk_path(entry["path"])
        place = os.path.join(root, path)
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        if kind == "link":
            oid = re.fullmatch(rb"pg_tblspc/([0-9]+)", path)
            need(oid, f"a link that is no tablespace's: {path!r}")
            to = places.get(oid[1].decode())
            need(to, f'where to? --tablespace {oid[1].decode()}=DIR (it was {entry["target"]})')
            os.makedirs(to, mode=0o700, exist_ok=True)
            need(not os.listdir(to), f"not empty: {to}")
            os.symlink(os.path.abspath(to), place)
        elif kind == "directory":
            os.makedirs(place, mode=0o700, exist_ok=True)
            os.chmod(place, entry["mode"] & 0o777)
        else:
            with open(place, "xb") as out:
                out.writelines(repository.content(asked.system, packs, entry))
            os.chmod(place, entry["mode"] & 0o777)
    os.rename(root, asked.out)


class Arguments(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        raise Refused(message)


def arguments():
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identity", metavar="FILE", help="an age identity that opens the data keys")
    parser.add_argument("--accept-plain", action="store_true", help="also read objects that are not encrypted")
    commands = parser.add_subparsers(required=True)

    def command(name, run, *positional, out=True):
        one = commands.add_parser(name)
        one.set_defaults(run=run)
        for argument in ("repo", *positional):
            one.add_argument(argument)
        if out:
            one.add_argument("-o", dest="out", required=True)
        return one

    command("list", list_repository, out=False)
    command("cat", print_object, "object", out=False)
    command("segment", write_segment, "cluster", "system_id", "name")
    command("file", write_file, "cluster", "system_id", "backup", "path")
    backup = command("backup", write_backup, "cluster", "system_id", "backup")
    backup.add_argument("--tablespace", metavar="OID=DIR", action="append", default=[])
    return parser.parse_args()


def main():
    try:
        asked = arguments()
        if "cluster" in asked:
            asked.system = f"{asked.cluster}/{asked.system_id}"
        need(os.path.isdir(asked.repo), f"no such folder: {asked.repo}")
        need(asked.identity is None or os.path.isfile(asked.identity), f"no such identity file: {asked.identity}")
        asked.run(Repository(asked.repo, asked.identity, asked.accept_plain), asked)
    except NotStored as error:
        system = asked.system if "system" in asked else None
        if system and not os.path.isfile(os.path.join(asked.repo, system, "cluster.json")):
            say(f"refused: {asked.repo} holds no {system}: another name, or a disk that is not mounted?")
            return 200
        say(f"not stored: {error}")
        return 1
    except Exception as error:  # PostgreSQL takes 1 to 125 for the end of the archive
        say(f"refused: {error if isinstance(error, Refused) else repr(error)}")
        return 200
    return 0


if __name__ == "__main__":
    sys.exit(main())
