"""This module is the tree of errors that somaflow's callers may act on.

::

    SomaflowError                     70  a bug of ours unless a subclass says otherwise
    ├── UsageError      (ValueError)   2  the command's words do not fit together
    ├── SettingsError   (ValueError)   3  a TOML file or a --set holds a bad key or value
    ├── InputRefused    (ValueError)   4  a source, payload or checkpoint is not what it claims to be
    ├── StorageError    (OSError)      5  a lake, snapshot or file cannot be read or written
    │   └── MissingError (FileNotFoundError)  ... because it is not there
    ├── ConflictError   (RuntimeError) 6  somebody else holds or changed what this needs
    ├── InterruptedRun  (RuntimeError) 7  stopped half-way; the same command resumes, or begins again
    └── VerificationError (ValueError) 8  what was read back differs from what was promised

The number is the exit status of a command that ends with the error. Status 1 is kept for "finished, but some of the
inputs were refused".
"""

from __future__ import annotations

import errno

PARTIAL = 1


class SomaflowError(Exception):
    """The root of the tree; ``exit_code`` is the exit status of a command that ends with it."""

    exit_code = 70


class UsageError(SomaflowError, ValueError):
    """The command's words do not fit together."""

    exit_code = 2


class SettingsError(SomaflowError, ValueError):
    """A settings file or override holds an unknown key or an impossible value."""

    exit_code = 3


class InputRefused(SomaflowError, ValueError):
    """A source, payload or checkpoint is not what it claims to be; nothing of it was used."""

    exit_code = 4


class StorageError(SomaflowError, OSError):
    """A lake, snapshot or file cannot be read or written."""

    exit_code = 5


class MissingError(StorageError, FileNotFoundError):
    """Something that was named is not there."""


class ConflictError(SomaflowError, RuntimeError):
    """Somebody else holds, or has meanwhile changed, what this command needs."""

    exit_code = 6


class InterruptedRun(SomaflowError, RuntimeError):
    """The run stopped half-way; the same command resumes it."""

    exit_code = 7


class VerificationError(SomaflowError, ValueError):
    """What was read back differs from what was promised when it was written."""

    exit_code = 8


def is_of_memory(error: BaseException) -> bool:
    """Say whether an error means that no memory was left, however a library words it (TileDB, HDF5, the system)."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(words in str(error) for words in ("std::bad_alloc", "memory allocation failed"))
