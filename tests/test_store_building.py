"""Building snapshots: what a build does when others come, go and die at the wrong moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from encoded import add_dataset

from store import snapshot
from store.errors import UsageError
from store.lake import Lake, open_lake
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot
from store.writer import LakeWriter


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A lake of one dataset of 60 cells, for one test."""
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30})
    return uri


def test_of_two_that_make_one_name_the_second_leaves_the_first_ones_snapshot(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[snapshot.Snapshot] = []

    def slow(*args: Any) -> Lake:
        """Open the lake, while another makes the same snapshot from beginning to end."""
        if not made:
            made.append(None)  # type: ignore[arg-type]
            made[0] = create_snapshot(uri, "s", SnapshotSettings())
        return open_lake(*args)

    monkeypatch.setattr("store.snapshot.open_lake", slow)
    with pytest.raises(UsageError, match="there is a snapshot 's'; snapshots never change"):
        create_snapshot(uri, "s", SnapshotSettings(where="cell_type == 'even'"))
    assert open_snapshot(uri, "s").id == made[0].id
    made[0].verify()
