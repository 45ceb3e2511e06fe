"""How TileDB is opened: reads that touch many fragments get by with a small budget where they are told of."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma

from store.context import ORDER_TILES, reading, soma_context, tiledb_config, tiledb_context
from store.errors import StorageError, VerificationError

FRAGMENTS, CELLS, BUDGET = 30, 4096, 2**20
APART = 2048  # rows from one fragment to the next, so that no tile of TileDB's holds two


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An array of as many fragments as were written, a tile of 64 KB coordinates in each."""
    uri = str(tmp_path_factory.mktemp("many") / "array")
    tiledbsoma.SparseNDArray.create(
        uri, type=pa.float32(), shape=(FRAGMENTS * APART, CELLS), context=soma_context()
    ).close()
    columns = np.arange(CELLS, dtype=np.int64)
    for row in range(FRAGMENTS):
        with tiledbsoma.SparseNDArray.open(uri, "w", context=soma_context()) as array:
            values = {"soma_dim_0": np.full(CELLS, row * APART, np.int64), "soma_dim_1": columns}
            array.write(pa.table(values | {"soma_data": columns.astype(np.float32)}))
    return uri


def read(uri: str, rows: slice, **words: bool) -> int:
    with tiledbsoma.SparseNDArray.open(uri, context=soma_context(budget_bytes=BUDGET, **words)) as array:
        return sum(part.num_rows for part in array.read((rows,)).tables())


def test_no_read_starts_the_task_that_tiledb_does_not_wait_for() -> None:
    assert tiledb_config()[ORDER_TILES] == 0
    assert soma_context().tiledb_config[ORDER_TILES] == 0
    assert tiledb_context().config()[ORDER_TILES] == "0"


def test_ctrl_c_does_no_harm_where_a_shell_lets_a_command_ignore_it(many: str) -> None:
    script = f"""
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import tiledbsoma
from store.context import soma_context
tiledbsoma.SparseNDArray.open({many!r}, context=soma_context()).close()
signal.raise_signal(signal.SIGINT)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_a_small_budget_is_enough_for_few_fragments_and_for_many_if_they_are_told_of(many: str) -> None:
    assert read(many, slice(7 * APART, 8 * APART)) == 2 * CELLS
    assert read(many, slice(0, FRAGMENTS * APART - 1), scattered=True) == FRAGMENTS * CELLS
    with pytest.raises(tiledbsoma.SOMAError, match="per fragment memory"):
        read(many, slice(0, FRAGMENTS * APART - 1))


FAILED_ON_S3 = "Failed to read S3 object s3://lakes/x/a0.tdb[Error Type: 15] [HTTP Response Code: 403] [Remote IP: ::1]"


@pytest.mark.parametrize(
    "text",
    [
        f"Error opening array: 's3://lakes/x'\n  [TileDB::Array] Error: S3: {FAILED_ON_S3}",
        f"[TileDB::Task] Error: Caught std::exception: S3: {FAILED_ON_S3}",
        "[TileDB::Array] Error: VFS: the bucket is gone",
        "Error opening array\n  [TileDB::Array] Error: IO Error: Cannot get file size of 'a0.tdb'; No such file",
    ],
)
def test_what_a_store_said_is_no_damage_whatever_part_of_tiledb_passes_it_on(text: str) -> None:
    with pytest.raises(StorageError, match=r"there: cannot be read: .*(S3|VFS|IO Error): ") as caught, reading("there"):
        raise tiledbsoma.SOMAError(text)
    assert "damaged" not in str(caught.value)
    assert "Remote IP" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "Query FAILED: [TileDB::Task] Error: Checksum mismatch in s3://lakes/S3/a0.tdb",
        "[TileDB::Task] Error: IO Error: Cannot read from file; Read exceeds file size: nbytes 9, file_size 4",
    ],
)
def test_damage_is_damage_on_s3_and_where_a_file_was_cut_off(text: str) -> None:
    with pytest.raises(VerificationError, match="the stored bytes are damaged"), reading("s3://lakes/S3"):
        raise tiledbsoma.SOMAError(text)
