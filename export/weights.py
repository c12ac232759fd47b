"""Weights in a file: each distinct one once, and a digest of all of them that is checked when they are read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bigain_fx.passes.errors import BigainError, ExportError, first_line

ALIGNMENT = 4096
"""Of each weight in a file: a page, so that it can be mapped."""


class WeightWriter:
    """Writes contents to ``file``, equal ones once.

    Args:
        file: takes bytes, from ``origin`` on in the file that is mapped one day.
        origin: see there.
    """

    def __init__(self, file: BinaryIO, origin: int = 0) -> None:
        self._file, self._origin, self._size = file, origin, 0
        self._offsets: dict[bytes, int] = {}

    @property
    def digest(self) -> str:
        """Of everything that was written, in its order."""
        return hashlib.sha256(b"".join(self._offsets)).hexdigest()

    def add(self, content: Any) -> tuple[int, bytes]:
        """Write ``content``, any buffer, if it is new; return its offset from the origin, and its digest."""
        digest = digest_of(content)
        if digest not in self._offsets:
            gap = -(self._origin + self._size) % ALIGNMENT
            self._file.write(bytes(gap))
            self._offsets[digest] = self._size + gap
            self._file.write(content)
            self._size += gap + memoryview(content).nbytes
        return self._offsets[digest], digest


def digest_of(content: Any) -> bytes:
    """SHA-256 of a buffer: 1.8 GB a second and core where the processor has instructions for it."""
    return hashlib.sha256(content).digest()


def digests_of(contents: Iterable[Callable[[], Any]]) -> list[bytes]:
    """The digests of what each of ``contents`` returns, on as many cores as there are."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda content: digest_of(content()), contents))


def fingerprint(digests: Mapping[str, bytes]) -> str:
    """One digest of named digests, whatever their order; a name says what the bytes are, dtype and shape too."""
    lines = [f"{name} {digest.hex()}\n" for name, digest in sorted(digests.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read what is in a user's file.

    Raises:
        ExportError: whatever goes wrong in the body, of whatever kind: a field is not what it should be.
    """
    try:
        yield
    except BigainError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"{path} is damaged ({what}); export it again") from error
