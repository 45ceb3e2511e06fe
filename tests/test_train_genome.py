"""What the genome says of features: places, bases on the right strand, motifs on both, genes beside peaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_cells import OFFSETS, cells
from test_train_loop import lake, settings  # noqa: F401
from test_train_model import CONFIG, SETTINGS

from store.errors import InputRefused, MissingError
from store.settings import parse_settings
from store.snapshot import open_snapshot
from train.genome import (
    Region,
    locate,
    motif_sets,
    neighbours,
    read_motifs,
    read_regions,
    read_windows,
    region_of,
)
from train.identity import Identity, Stem
from train.knowledge import gather_knowledge
from train.loop import Run
from train.model import CellModel
from train.predictor import Predictor
from train.settings import RunSettings
from train.tokens import make_tokens

MOTIF = """>MA0001.1\tRUNX1
A [ 0 0 40 0 0 40 0 0 ]
C [ 0 40 0 0 40 0 0 0 ]
G [ 0 0 0 40 0 0 40 0 ]
T [ 40 0 0 0 0 0 0 40 ]
"""
"""Says TCAGCAGT."""


def test_ids_tell_regions_and_a_bed_file_tells_the_rest(tmp_path: Path) -> None:
    assert (
        region_of("chr1:100-200") == region_of("chr1-100-200") == region_of("chr1_100_200") == Region("chr1", 100, 200)
    )
    assert region_of("GL000.1:5-9") == Region("GL000.1", 5, 9)
    assert [region_of(name) for name in ("HLA-A", "chr1:200-100", "ENSG00000000003.14")] == [None] * 3
    bed = tmp_path / "genes.bed"
    bed.write_text("# made up\nchr1\t1000\t3000\tAAA\t0\t+\nchr1\t9000\t9500\tBBB\t-\nchr2\t5\t9\tENSG1\n")
    genes = read_regions(bed)
    assert genes["BBB"] == Region("chr1", 9000, 9500, "-")
    assert [genes[name].middle for name in ("AAA", "BBB", "ENSG1")] == [1000, 9500, 7]
    names = [("x", "AAA"), ("ENSG1.4", ""), ("chr1:10-20", ""), ("nobody", "")]
    assert locate(names, genes) == [genes["AAA"], genes["ENSG1"], Region("chr1", 10, 20), None]
    bed.write_text("chr1\t1000\t300\tAAA\n")
    with pytest.raises(InputRefused, match="line 1: chromosome, start, end and name"):
        read_regions(bed)
    with pytest.raises(MissingError, match="no such file of positions"):
        read_regions(tmp_path / "none")


def test_a_peak_inherits_from_genes_that_it_overlaps_or_comes_before() -> None:
    genes = {"AAA": Region("chr1", 10_000, 12_000, "+"), "BBB": Region("chr1", 20_000, 22_000, "-")}
    peaks = {
        "chr1:8500-8600": ("AAA",),
        "chr1:12500-12600": None,
        "chr1:11999-12001": ("AAA",),
        "chr1:23500-23600": ("BBB",),
        "chr1:18500-18600": None,
        "chr1:11000-21000": ("AAA", "BBB"),
        "chr2:8500-8600": None,
    }
    found = neighbours([(name, "") for name in peaks], genes)
    assert found == {name: own for name, own in peaks.items() if own}
    known = gather_knowledge([("chr1:11000-21000", ""), ("g", "AAA")], {"s": ["AAA", "CCC"]}, {}, found)
    assert known.feature_E.tolist() == [1, 2]


def test_windows_are_on_the_features_strand_and_unknown_bases_stay_unknown(tmp_path: Path) -> None:
    fasta = tmp_path / "genome.fa"
    fasta.write_text(">chr1\nAACCGGTTNNACGTAC\nGT\n>ENST1 cdna of something\nTTTTACGT\n")
    names = [("plus", ""), ("minus", ""), ("ENST1.2", ""), ("edge", ""), ("nobody", "")]
    places = [Region("chr1", 4, 9, "+"), Region("chr1", 1, 4, "-"), None, Region("chr1", 0, 5, "+"), None]
    found = read_windows(names, places, fasta, 6)
    letters = ["".join(" ACGT"[code] for code in line) for line in found]
    assert letters == [" " * 6, "ACCGGT", "ACCGGT", "TTTTAC", "   AAC", " " * 6]
    assert not (tmp_path / "genome.fa.fai").exists(), "nothing is left beside the file"
    with pytest.raises(InputRefused, match="no feature is a record"):
        read_windows([("nobody", "")], [None], fasta, 6)
    with pytest.raises(MissingError, match="no such FASTA file"):
        read_windows(names, places, tmp_path / "none.fa", 6)
    fasta.write_text("no fasta\n")
    with pytest.raises(InputRefused, match="FASTA"):
        read_windows(names, places, fasta, 6)


def test_a_motif_is_found_on_either_strand_and_belongs_to_its_factor(tmp_path: Path) -> None:
    path = tmp_path / "motifs.jaspar"
    path.write_text(MOTIF)
    motifs = read_motifs(path)
    rng = np.random.default_rng(0)
    plain = rng.integers(1, 5, (4, 30)).astype(np.uint8)
    word = np.array(["ACGT".index(base) + 1 for base in "TCAGCAGT"], np.uint8)
    plain[1, 5:13] = word
    plain[2, 15:23] = (5 - word)[::-1]
    plain[3, 5:13] = word
    plain[3, 8] = 0
    bases = np.concatenate([np.zeros((1, 30), np.uint8), plain])
    names = [("peak0", ""), ("peak1", ""), ("peak2", ""), ("peak3", "")]
    assert motif_sets(names, bases, motifs) == {"motif MA0001.1 RUNX1": ("peak1", "peak2", "RUNX1")}
    path.write_text("nothing\n")
    with pytest.raises(InputRefused, match="motif"):
        read_motifs(path)


def test_the_stem_reads_both_strands_alike_and_learns_a_word() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    bases = rng.integers(1, 5, (256, 64)).astype(np.uint8)
    label = np.arange(256) % 2
    word = np.array(["ACGT".index(base) + 1 for base in "TCAGCAGTAC"], np.uint8)
    for number in np.flatnonzero(label):
        at = rng.integers(0, 54)
        bases[number, at : at + 10] = word if rng.uniform() < 0.5 else (5 - word)[::-1]
    stem, read = Stem(8), torch.nn.Linear(8, 1)
    window = torch.from_numpy(bases)
    torch.testing.assert_close(stem(window), stem((5 - window).flip(1)), rtol=1e-4, atol=1e-5)
    assert not stem(torch.zeros(1, 64, dtype=torch.uint8)).any()
    optimizer = torch.optim.Adam([*stem.parameters(), *read.parameters()], 5e-3)
    truth = torch.from_numpy(label).float()
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(read(stem(window[:192]))[:, 0], truth[:192])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    told = (read(stem(window[192:]))[:, 0] > 0).float()
    assert float((told == truth[192:]).float().mean()) > 0.85


def test_where_a_feature_lies_and_its_bases_are_part_of_who_it_is() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, n_chromosomes=2, window=32)
    identity = Identity(config)
    chromosome = torch.tensor([0, 1, 1, 2, 0] + [1] * 34)
    base = torch.cat([torch.tensor([torch.nan, 1e6, 1e6, 1e6, torch.nan]), torch.full((34,), 2e6)])
    bases = torch.randint(1, 5, (39, 32), dtype=torch.uint8)
    bases[2] = bases[1]
    identity.lie(chromosome, base, bases)
    with torch.no_grad():
        identity.own.weight[1:] = identity.own.weight[1]
        found = identity(torch.arange(39))
    torch.testing.assert_close(found[1], found[2])
    assert (found[1] - found[3]).abs().max() > 1e-4
    model = CellModel(config)
    model.identity.lie(chromosome, base, bases)
    tokens = make_tokens(cells(6), OFFSETS, SETTINGS)
    model(tokens).embedding_CD.sum().backward()
    for name, parameter in model.identity.named_parameters():
        if name.startswith(("stem", "chromosome", "base")):
            assert parameter.grad is not None, name
    assert model(make_tokens(cells(1).take(np.empty(0, np.int64)), OFFSETS, SETTINGS)).embedding_CD.shape == (0, 16)


def test_a_run_reads_bases_motifs_and_positions_and_exports_them(lake: str, tmp_path: Path) -> None:  # noqa: F811
    ids = open_snapshot(lake, "s").vocabulary("RNA")["feature_id"].to_pylist()
    rng = np.random.default_rng(0)
    genome = "".join(rng.choice(list("ACGT"), 4000))
    genome = genome[:1000] + "TCAGCAGT" + genome[1008:2000] + "TCAGCAGT" + genome[2008:]
    (tmp_path / "g.fa").write_text(f">chr1\n{genome}\n")
    (tmp_path / "g.bed").write_text(
        "".join(f"chr1\t{100 * n}\t{100 * n + 50}\t{one}\t0\t+\n" for n, one in enumerate(ids[:40]))
    )
    (tmp_path / "m.jaspar").write_text(MOTIF)
    told = {
        "positions": str(tmp_path / "g.bed"),
        "genome": str(tmp_path / "g.fa"),
        "motifs": str(tmp_path / "m.jaspar"),
    }
    words = settings(lake, tmp_path / "runs", steps=3, knowledge=told | {"window": 64})
    summary = Run(words, world=1).train()
    predictor = Predictor.load(summary.checkpoint)
    config = predictor.model.config
    assert (config.n_chromosomes, config.window, config.n_sets) == (1, 64, 1)
    assert set(predictor.manifest["knowledge"]) == set(told.values())
    window = predictor.model.identity.bases_FW[1 + ids.index(ids[5])].numpy()
    assert "".join("NACGT"[code] for code in window) == genome[500 - 32 : 500 + 32]
    members = predictor.model.identity.memberships(torch.arange(len(ids) + 1))[1].nonzero()[:, 0].tolist()
    found = {ids[number - 1] for number in members}
    assert {ids[10], ids[20]} <= found
    assert len(found) < 15, "beside the two planted ones, chance"
    with pytest.raises(Exception, match="name the FASTA file to look in"):
        parse_settings(RunSettings, {"snapshot": "s", "knowledge": {"motifs": "m"}}, where="test")
