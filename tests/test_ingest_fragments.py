"""Fragments: which insertions count where, and peaks that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ingest.job import SourceSettings
from ingest.sources import fragments
from store.errors import InputRefused


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))


def counted(folder: Path, lines: str, bed: str) -> dict[str, dict[str, int]]:
    """Count fragments (chromosome, start, end, barcode) in peaks: peak to cell to insertions."""
    (folder / "fragments.tsv").write_text("".join(f"{line}\n" for line in lines.split(" | ")).replace(" ", "\t"))
    (folder / "peaks.bed").write_text(bed)
    source = SourceSettings(uri=str(folder / "fragments.tsv"), peaks=str(folder / "peaks.bed"), min_fragments=1)
    opened = fragments.open_dataset(source, "x")
    part = opened.parts["ATAC"]
    table = part.rows(0, opened.n_obs).toarray()
    return {
        str(peak): {cell: int(table[row, column]) for row, cell in enumerate(opened.obs.index) if table[row, column]}
        for column, peak in enumerate(part.var.index)
    }


def test_an_insertion_counts_in_every_peak_that_contains_it(tmp_path: Path) -> None:
    bed = "chr1\t0\t1000\nchr1\t100\t200\nchr1\t150\t600\nchr1\t2000\t2100\nchr2\t5\t9\n"
    # ends: 50 and 150 | 500 and 999 | 1000 and 2099 | 1999 and 2100 | 5 and 9, of chr2
    lines = "chr1 50 151 A | chr1 500 1000 A | chr1 1000 2100 B | chr1 1999 2101 B | chr2 5 10 B | chr3 1 2 B"
    assert counted(tmp_path, lines, bed) == {
        "chr1:0-1000": {"A": 4},
        "chr1:100-200": {"A": 1},
        "chr1:150-600": {"A": 2},
        "chr1:2000-2100": {"B": 1},
        "chr2:5-9": {"B": 1},
    }


def test_the_counts_of_a_peak_do_not_depend_on_the_other_peaks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 5000, 300)
    lines = " | ".join(f"chr1 {start} {start + rng.integers(1, 400)} {'AB'[start % 2]}" for start in starts)
    peaks = [f"chr1\t{low}\t{low + width}\n" for low, width in zip(starts[:40], rng.integers(1, 3000, 40), strict=True)]
    together = counted(tmp_path, lines, "".join(peaks))
    for number, peak in enumerate(dict.fromkeys(peaks)):
        (tmp_path / str(number)).mkdir()
        ((name, alone),) = counted(tmp_path / str(number), lines, peak).items()
        assert together[name] == alone


def test_lines_of_a_browser_are_no_peaks(tmp_path: Path) -> None:
    bed = 'browser position chr1:1-9\ntrack name="peaks" useScore=1\n#chrom\nchr1\t0\t100\t"a\n'
    assert counted(tmp_path, "chr1 50 151 A", bed) == {"chr1:0-100": {"A": 1}}


@pytest.mark.parametrize(
    ("bed", "said"),
    [
        ("1\t0\t100\n2\t0\t100\n", r"no fragment on a chromosome of .*peaks\.bed \(1, 2\), but on chr1"),
        ("chr1\t100\t100\n", "a peak from 100 to 100 on chr1 is none"),
        ("chr1\t-5\t100\n", "a peak from -5 to 100 on chr1 is none"),
        ("chr1\tstart\tend\n", "not a BED file"),
        ("chr1\t0.5\t9\n", "not a BED file"),
        ("#\n", "not a BED file"),
    ],
)
def test_peaks_that_can_hold_nothing_are_refused(tmp_path: Path, bed: str, said: str) -> None:
    with pytest.raises(InputRefused, match=said):
        counted(tmp_path, "chr1 50 151 A", bed)
