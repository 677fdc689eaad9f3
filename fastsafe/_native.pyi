class Error(ValueError):
    """A file is malformed or unreadable; the message does not name it."""

class File:
    """An open regular file, read by pread from several threads with the GIL released."""

    def __init__(self, path: bytes) -> None: ...
    @property
    def size(self) -> int: ...
    def header(
        self,
    ) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str], int]:
        """Tensors by name (dtype, shape, begin, end), metadata, offset of the data in bytes."""
    def read_into(
        self, address: int, capacity: int, ranges: list[tuple[int, int, int]], threads: int = 0
    ) -> None:
        """Fill memory at ``address``, which must hold ``capacity`` bytes.

        Ranges are (offset in the file, offset in the memory, bytes); 0 threads means one per core.
        """
    def read_bytes(self, offset: int, bytes: int) -> bytes: ...
