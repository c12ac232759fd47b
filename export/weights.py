"""Weights in a file: each distinct one once, and a digest of all of them that is checked when they are read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

ALIGNMENT = 4096
"""Of each weight in a file: a page, so that it can be mapped."""


class WeightWriter:
    """Writes contents to ``file``, equal ones once.

    Attributes:
        digest: of everything that was written, in its order.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(self._offsets)).hexdigest()

    def add(self, content: Any) -> tuple[int, bytes]:
        """Write ``content``, any buffer, if it is new; return where it is in the file, and its digest."""
        digest = digest_of(content)
        if digest not in self._offsets:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._offsets[digest] = self._file.tell()
            self._file.write(content)
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
