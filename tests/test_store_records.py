"""Records and tables of a lake: what cannot be written or read is an error of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from store import catalog, records
from store.errors import StorageError, VerificationError

TABLE = pa.table({"a": list(range(10_000))})


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "below")
    for write in (lambda: records.replace(inside, {}), lambda: records.write_table(inside, TABLE)):
        with pytest.raises(StorageError, match=r"file/below: cannot be written: .*; check the place"):
            write()


def test_a_record_that_cannot_be_replaced_stays_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    records.replace(str(tmp_path / "1.json"), {"a": 1})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        records.replace(str(tmp_path / "1.json"), {"a": 2})
    assert records.read(str(tmp_path / "1.json")) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["1.json"]


def test_a_table_that_is_not_there_or_not_whole_is_told(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.parquet")
    with pytest.raises(FileNotFoundError):
        records.read_table(uri)
    records.write_table(uri, TABLE)
    assert records.read_table(uri).equals(TABLE)
    Path(uri).write_bytes(Path(uri).read_bytes()[:-20])
    with pytest.raises(VerificationError, match=r"t.parquet: is not whole"):
        records.read_table(uri)


def test_a_plan_that_a_newer_version_made_is_told_as_such(tmp_path: Path) -> None:
    plan = catalog.create_plan(str(tmp_path), [], key="k", dataset_id="d", organism="o", n_obs=5)
    assert catalog.plans(str(tmp_path)) == [plan]
    (path,) = (tmp_path / "somaflow" / "plans").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "later": 1}), encoding="utf-8")
    with pytest.raises(StorageError, match="plan 0 tells 'later': a newer version of somaflow made it"):
        catalog.plans(str(tmp_path))
