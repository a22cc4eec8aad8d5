"""The samples of a tar: its members, grouped by key and field as webdataset does."""

import posixpath
import re
import tarfile
from typing import BinaryIO, NamedTuple

from data.files import is_machine_fault, raise_named
from data.schema import shorten

TAR_BLOCK = 512  # bytes; headers and members of a tar begin at multiples of it
MAX_EMPTY = 2**20  # bytes of a tar without members; a longer file of zeros was damaged
Span = tuple[int, int]  # start and length in the tar
Spans = dict[str, Span]  # of a sample, by field
DAMAGE_ERRORS = (  # that a damaged tar raises
    tarfile.TarError,
    EOFError,
    ValueError,
    OverflowError,
    RecursionError,
    OSError,
)
COMPRESSIONS = {  # by the first bytes of a file
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class PassedOver(NamedTuple):
    """Members that are not read, for one reason."""

    first: str  # name of the first one
    members: int


class TarContents(NamedTuple):
    """What is intact in a tar."""

    samples: list[tuple[str, Spans]]  # key and spans, in the order of their first members
    passed_over: dict[str, PassedOver]  # members that are not read, by the reason
    end: int  # byte at which the intact part ends
    complete: bool  # whether the end of the archive follows


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and field, as webdataset does; None if it has no field.

    The field begins after the first dot that follows the last slash. It is in lower case.
    """
    found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name)
    if found is None:
        return None
    return found[1], found[2].lower()


class _Grouping:
    """Groups members into samples. A field that a key has already begins another sample of it."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, Spans]] = []
        self.passed_over: dict[str, PassedOver] = {}
        self._latest: dict[str, Spans] = {}  # the latest sample of each key

    def add(self, member: tarfile.TarInfo) -> None:
        """Add a member. A sample whose only members cannot be read has no spans."""
        if member.isdir():
            return
        name = split_name(member.name)
        if name is None:
            self._pass_over(member.name, "their names have no field")
            return
        key, field = name
        spans = self._latest.get(key)
        if spans is None or field in spans:
            spans = {}
            self._latest[key] = spans
            self.samples.append((key, spans))

        # Where the content is.
        if member.issparse():
            self._pass_over(member.name, "they are stored sparsely; write the tar without --sparse")
        elif member.isreg():
            spans[field] = (member.offset_data, member.size)
        elif member.islnk() or member.issym():
            self._add_link(member, field, spans)
        else:
            self._pass_over(member.name, "they are neither files nor links")

    def _add_link(self, member: tarfile.TarInfo, field: str, spans: Spans) -> None:
        """Add a link to a member that lies before it."""
        target = member.linkname
        if member.issym():
            target = posixpath.join(posixpath.dirname(member.name), target)
        plain = posixpath.normpath(target)
        for name in map(split_name, (target, plain, f"./{plain}")):
            span = self._latest.get(name[0], {}).get(name[1]) if name else None
            if span:
                spans[field] = span
                return
        self._pass_over(member.name, "they are links to no member before them")

    def _pass_over(self, name: str, reason: str) -> None:
        first, count = self.passed_over.get(reason, (name, 0))
        self.passed_over[reason] = PassedOver(first, count + 1)


def scan_tar(file: BinaryIO, size: int, url: str) -> TarContents:
    """Find the samples in the intact part of a tar of `size` bytes.

    Args:
        file: the tar, open.
        size: its bytes.
        url: its name in messages.

    Raises:
        ValueError: the tar is compressed, or goes on after its end.
    """
    _check_plain(file, url)
    grouping = _Grouping()
    end = 0
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            member = tar.next()
            while member:
                # Stop where a member is torn, or where a forged header leads back.
                is_plain = member.isreg() and not member.issparse()
                content = member.size if is_plain else 0
                backward = content < 0 or member.offset < end or tar.offset <= member.offset
                if backward or member.offset_data + content > size:
                    break
                end = tar.offset

                # Forget the members so far: the list would grow with the tar.
                tar.members.clear()  # type: ignore[attr-defined]
                grouping.add(member)
                member = tar.next()
    except DAMAGE_ERRORS as error:
        if is_machine_fault(error):
            raise_named(error, url)
        # Otherwise the tar is damaged from `end` on, which the caller handles.
    end = min(end, size)
    complete = _is_complete(file, end, size, url) and (end > 0 or size <= MAX_EMPTY)
    return TarContents(grouping.samples, grouping.passed_over, end, complete)


def _check_plain(file: BinaryIO, url: str) -> None:
    """Check that a tar is not compressed: its members could not be found by their offsets."""
    file.seek(0)
    beginning = file.read(8)
    for magic, name in COMPRESSIONS.items():
        if beginning.startswith(magic):
            raise ValueError(
                f"{url}: is compressed ({name}); decompress it, and give the plain tar"
            )


def _is_complete(file: BinaryIO, end: int, size: int, url: str) -> bool:
    """Whether the end of the archive follows the last member.

    Raises:
        ValueError: members follow the end of the archive, which programs disagree on.
    """
    file.seek(end)
    following = file.read(TAR_BLOCK)
    if len(following) < TAR_BLOCK or any(following):
        return False

    # An archive ends with zeros, to which other programs may have joined another tar.
    position = end + TAR_BLOCK
    while position < size and not any(following):
        position = file.tell()
        following = file.read(TAR_BLOCK)
        if not following:
            return True
    if following[257:262] == b"ustar":
        raise ValueError(
            f"{url}: goes on after its end, with a member at byte {position:,} (were tars joined "
            "by `cat`?); keep them apart, or join them with `tar --concatenate`"
        )
    return True


def describe_passed_over(passed_over: dict[str, PassedOver]) -> str:
    """Return what was not read, with the number and the first of each kind."""
    parts = []
    for reason, (first, count) in passed_over.items():
        parts.append(f"{count} members, such as {shorten(first)} ({reason})")
    return "; ".join(parts)
