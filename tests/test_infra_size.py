"""The sizing calculator: its arithmetic by hand, what grows, what is said, and what is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import size
from train.arithmetic import DEVICES, Seen, operations
from train.cells import PROMPTS
from train.config import ModelConfig
from train.estimate import MFU, Plan
from train.model import CellModel

ROOT = Path(__file__).parent.parent


COSTS = size.read_costs()
VALUES = size.values_of(COSTS)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = size.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


def test_the_arithmetic_is_that_of_a_hand() -> None:
    ask = size.Ask(
        cells=1_000_000, nonzeros=1_000, datasets=100, hours=1, width=10, layers=2, tokens=500, genes=50, rate=10
    )
    values = dict(VALUES) | {
        "ingest.core_s_per_nonzero": 1e-4,
        "ingest.start_s": 0.1,
        "ingest.dataset_s": 1.0,
        "node.cores": 10,
        "node.efficiency": 0.5,
        "price.cpu_node_hour": 2.0,
        "train.gpu_operations_s": 1e9,
        "train.mfu": 0.5,
        "cpu.operations_s": 2 * 9.1e7,
        "cpu.half_width": 10,
        "serve.http_share": 0.5,
        "storage.lake_bytes_per_nonzero": 2.0,
        "storage.states_kept": 2,
        "storage.state_bytes_per_weight": 12,
    }
    found = size.size(ask, values)
    # a billion non-zeros are 100,000 core-seconds: 20,000 s of a node, so six nodes within the hour
    assert found.ingest.machines == 6
    assert found.ingest.work_hours == pytest.approx(100_000 / 3600)
    assert found.ingest.hours == pytest.approx((0.1 + 20_000 / 6) / 3600)
    assert found.ingest.money == pytest.approx(2.0 * 6 * found.ingest.hours)
    # 500 tokens: 6 x 2,200 weights x 500, 12 x 10 x 2 x 500 x 500 for pairs, and 6 x 1,000 weights of decoders
    assert ask.n_operations == 6_600_000 + 60_000_000 + 6_000
    assert ask.n_weights == 3_700 + 1_500
    assert found.train.work_hours == pytest.approx(1_000_000 * 66.606e6 / 0.5e9 / 3600)
    assert found.copies == math.ceil(10 / (0.5 * 9.1e7 / 22.202e6))
    assert found.lake_bytes == 2e9
    assert found.checkpoint_bytes == 5_200 * (4 + 24)


@pytest.mark.parametrize(
    ("width", "layers", "genes", "tokens"),
    [(64, 2, 2_000, 500), (128, 4, 36_000, 2_000), (512, 12, 36_000, 2_000), (1_024, 24, 60_000, 2_048)],
)
def test_weights_and_operations_are_about_those_of_the_model(width: int, layers: int, genes: int, tokens: int) -> None:
    fields = dict.fromkeys(PROMPTS, 2)
    with torch.device("meta"):
        model = CellModel(ModelConfig({"RNA": genes}, fields, 2, width=width, layers=layers, heads=8))
    ask = size.Ask(cells=1, nonzeros=tokens, genes=genes, width=width, layers=layers, tokens=tokens)
    assert ask.n_weights == pytest.approx(sum(part.numel() for part in model.parameters()), rel=0.03)
    head, queries = 1 + model.config.prompt_tokens, 16
    places = head + tokens
    seen = Seen(1, tokens, places, head, places**2, places**2, head**2, queries, queries * places)
    assert 0.92 < ask.n_operations / operations(model, seen) <= 1


def test_commits_of_one_driver_are_not_shortened_by_nodes() -> None:
    few, many = (size.size(size.Ask(cells=10**9, datasets=n), VALUES).ingest for n in (10, 1_000_000))
    assert few.in_time
    assert not many.in_time
    assert many.hours >= 1_000_000 * VALUES["ingest.dataset_s"] / 3600


def test_pieces_of_a_snapshot_grow_with_the_square() -> None:
    small, large = (size.size(size.Ask(cells=n), VALUES).ranges for n in (10**8, 10**9))
    assert large == pytest.approx(100 * small)


GROW = ("ingest", "snapshot", "train")


@settings(max_examples=40)
@given(cells=st.integers(1, 10**9), more=st.integers(1, 10**9), nonzeros=st.floats(1, 20_000))
def test_more_cells_never_need_less(cells: int, more: int, nonzeros: float) -> None:
    small, large = (size.size(size.Ask(cells=n, nonzeros=nonzeros, datasets=1), VALUES) for n in (cells, cells + more))
    for name in GROW:
        assert getattr(small, name).work_hours <= getattr(large, name).work_hours
        assert getattr(small, name).machines <= getattr(large, name).machines
    assert small.lake_bytes < large.lake_bytes
    assert small.money < large.money * (1 + 1e-9)


@settings(max_examples=40)
@given(cells=st.integers(1, 10**9), hours=st.floats(0.5, 100))
def test_the_fewest_nodes_are_taken_that_end_in_time(cells: int, hours: float) -> None:
    found = size.size(size.Ask(cells=cells, datasets=1, hours=hours), VALUES)
    for step, start in ((found.ingest, "ingest.start_s"), (found.snapshot, "snapshot.start_s")):
        assert step.hours <= hours * (1 + 1e-9)
        node_hours = step.work_hours / VALUES["node.cores"] / VALUES["node.efficiency"]
        if step.machines > 1:
            assert VALUES[start] / 3600 + node_hours / (step.machines - 1) > hours * (1 - 1e-9)


def test_every_cost_that_is_said_moves_the_answer() -> None:
    ask = size.Ask(cells=10**9, datasets=500_000)
    before = asdict(size.size(ask, VALUES))
    for name, value in VALUES.items():
        assert asdict(size.size(ask, VALUES | {name: 1.5 * value})) != before, name


def test_the_gpu_is_that_of_the_plan() -> None:
    assert VALUES["train.gpu_operations_s"] == DEVICES["h100"].half
    assert VALUES["train.mfu"] == MFU


def test_every_cost_says_where_it_comes_from() -> None:
    for name, cost in COSTS.items():
        assert len(cost.source) > 10, name
        assert name not in size.SHARES or cost.high <= 1
        if cost.measured:
            pages = re.findall(r"docs/[\w/.-]+", cost.source)
            assert re.search(r"20\d\d-\d\d-\d\d", cost.source), f"{name}: no date"
            assert any(list(ROOT.glob(f"{page.rstrip('.,')}*")) for page in pages), f"{name}: {pages}"
            made = re.findall(r"`make ([a-z-]+)`", cost.source)
            assert all(f"\n{verb}:" in (ROOT / "Makefile").read_text() for verb in made), name
    assert not any(COSTS[name].measured for name in COSTS if name.startswith("price."))


def test_assumptions_and_the_largest_uncertainty_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(capsys, "--cells", "1e6", "100e6", "1e9", "--set", "price.gpu_hour=7")
    assert status == 0
    for name, cost in COSTS.items():
        assert f"- {name} = " in out
        assert cost.source in out or name == "price.gpu_hour"
    assert "- price.gpu_hour = 7, assumed: said by --set" in out
    assert "not in proportion to the cells" in out
    assert out.count("largest uncertainty for") == 3
    assert "an example, no offer" in out


def test_the_largest_uncertainty_is_the_range_that_moves_the_sum_most() -> None:
    ask = size.Ask(cells=10**8)
    name, low, high = size.largest_uncertainty(ask, COSTS)
    assert low <= size.size(ask, VALUES).money <= high
    for other, cost in COSTS.items():
        sums = [size.size(ask, VALUES | {other: end}).money for end in (cost.low, cost.high)]
        assert abs(sums[1] - sums[0]) <= high - low + 1e-9, (name, other)


def test_json_holds_what_the_table_does(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = told(capsys, "--cells", "250_000", "--hours", "2", "--json")
    answer = json.loads(out)
    (one,) = answer["sizes"]
    assert one["ask"]["cells"] == 250_000
    assert one["size"] == json.loads(json.dumps(asdict(size.size(size.Ask(cells=250_000, hours=2), VALUES))))
    assert set(answer["costs"]) == set(COSTS)


PLAN = {
    "device": "h200",
    "width": 256,
    "workers": 2,
    "parameters": {"all": 1000},
    "operations": 4e9,
    "cells_per_step": 4,
    "tokens_per_step": 400.0,
    "seconds_per_step": 0.25,
    "mfu": 0.5,
    "warnings": ["precision = 'no': set 'bf16'"],
}


def test_a_plan_takes_the_place_of_width_and_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    _, out, _ = told(
        capsys, "--cells", "1e6", "--json", "--plan", str(tmp_path / "plan.json"), "--set", "cpu.half_width=256"
    )
    found = json.loads(out)["sizes"][0]
    assert (found["ask"]["weights"], found["ask"]["operations"], found["ask"]["tokens"]) == (1000, 1e9, 100)
    assert found["ask"]["width"] == 256
    assert found["size"]["train_core_hours"] == pytest.approx(1e6 * 1e9 / (VALUES["cpu.operations_s"] / 2) / 3600)
    # four cells take two GPUs a quarter of a second: an eighth of a second of a GPU for each
    assert found["size"]["train"]["work_hours"] == pytest.approx(1e6 / 8 / 3600)


def test_a_plans_speed_and_warnings_are_told_and_what_is_said_of_costs_counts_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    words = ("--cells", "1e6", "--plan", str(tmp_path / "plan.json"))
    _, out, _ = told(capsys, *words)
    assert "warning of the plan: precision = 'no': set 'bf16'\n" in out
    assert "- train.gpu_operations_s = 1.6e+10, assumed: as the plan plan.json takes it, for device h200\n" in out
    _, out, _ = told(capsys, *words, "--json", "--set", "train.mfu=0.25")
    answer = json.loads(out)
    assert answer["warnings"] == PLAN["warnings"]
    assert answer["sizes"][0]["size"]["train"]["work_hours"] == pytest.approx(2 * 1e6 / 8 / 3600)


def test_hours_of_a_gpu_do_not_rest_on_steps_that_were_timed_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"device": "cpu", "mfu": None}))
    _, out, _ = told(capsys, "--cells", "1e6", "--json", "--plan", str(tmp_path / "plan.json"))
    answer = json.loads(out)
    assert answer["warnings"][-1].startswith("its steps were timed")
    assert answer["sizes"][0]["size"]["train"]["work_hours"] == pytest.approx(1e6 * 1e9 / (989e12 * MFU) / 3600)


@pytest.mark.parametrize("option", ["--width", "--layers", "--tokens"])
def test_what_a_plan_says_is_not_said_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    status, _, err = told(capsys, "--cells", "1e6", "--plan", str(tmp_path / "plan.json"), option, "512")
    assert status == 2
    assert err.startswith(f"size: {option}: ")


def test_every_plan_says_what_is_read_of_it() -> None:
    assert PLAN.keys() <= {field.name for field in fields_of(Plan)}


@pytest.mark.parametrize(
    "changes",
    [
        {"cells_per_step": 0},
        {"cells_per_step": -1},
        {"width": "256"},
        {"parameters": {"all": True}},
        {"operations": math.nan},
        {"tokens_per_step": math.inf},
        {"operations": 10**400},
        {"seconds_per_step": 0},
        {"workers": "2"},
        {"mfu": "half"},
    ],
    ids=str,
)
def test_a_plan_whose_numbers_are_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | changes))
    status, _, err = told(capsys, "--cells", "1e6", "--plan", str(tmp_path / "plan.json"))
    assert status == 2
    assert "plan.json: not what python -m train plan RUN.toml --json writes: " in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cells", "many"], "'many' is no number of cells"),
        (["--cells", "0"], "'0' is no number of cells"),
        (["--cells", "1.5"], "'1.5' is no number of cells"),
        (["--cells", "nan"], "'nan' is no number of cells"),
        (["--cells", "1e6", "--hours", "0"], "hours=0: a number above 0 is needed"),
        (["--cells", "1e6", "--nonzeros", "-3"], "nonzeros=-3: a number above 0"),
        (["--cells", "1e6", "--epochs", "nan"], "epochs=nan: a number above 0"),
        (["--cells", "1e6", "--set", "price.gpu_hours=1"], "did you mean price.gpu_hour?"),
        (["--cells", "1e6", "--set", "x=1"], "there is no cost 'x'; there are ingest.core_s_per_nonzero"),
        (["--cells", "1e6", "--set", "train.mfu=much"], "train.mfu=much: a number above 0"),
        (["--cells", "1e6", "--set", "train.mfu=0"], "train.mfu=0: a number above 0"),
        (["--cells", "1e6", "--set", "train.mfu=1e-320"], "the numbers are too large or too small to reckon with"),
        (["--cells", "1e6", "--nonzeros", "1e12", "--genes", "9" * 301], "too large to reckon with"),
        (["--cells", "1e6", "--nonzeros", "1e12"], "nonzeros=1e+12: a cell has no more of them than there are"),
        (["--cells", "1e6", "--rate", "1e300"], "rate=1e+300 is too large to reckon with"),
        (["--cells", "100", "--datasets", "1000"], "datasets=1,000: 100 cells are in no more datasets than cells"),
        (["--cells", "1e6", "--set", "train.mfu=40"], "train.mfu=40: a share is at most 1; did you mean 0.4?"),
        (["--cells", "1e6", "--set", "serve.http_share=2"], "serve.http_share=2: a share is at most 1"),
        (["--cells", "1e6", "--set", "node.efficiency=7"], "node.efficiency=7: a share is at most 1"),
        (["--cells", "1e6", "--nonzeros", "50000", "--genes", "36000"], "nonzeros=50000: a cell has no more of them"),
        (["--cells", "1e6", "--plan", "nowhere.json"], "nowhere.json: not what python -m train plan"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    try:
        status = size.main(words)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"value": 5.0}, "not within its range"),
        ({"note": "x"}, "value, range and either measured or assumed"),
        ({"measured": "x"}, "value, range and either measured or assumed"),
    ],
)
def test_a_cost_that_lacks_something_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    cost = {"value": 1.0, "range": [0.5, 2.0], "assumed": "a guess"} | changes
    lines = [f"{key} = {json.dumps(value)}" for key, value in cost.items()]
    (tmp_path / "costs.toml").write_text("\n".join(["[a.b]", *lines]))
    with pytest.raises(ValueError, match=expected):
        size.read_costs(tmp_path / "costs.toml")


def test_it_runs_as_a_script_with_nothing_but_python(tmp_path: Path) -> None:
    words = [sys.executable, "-I", "-S", str(ROOT / "infra" / "size.py"), "--cells", "1e6"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("cells ")


def test_the_readme_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")
    (block,) = (one for one in re.findall(r"```\n(.*?)```", text, re.DOTALL) if one.startswith("cells "))
    _, out, _ = told(capsys, "--cells", "1e6", "100e6", "1e9")
    said = out.splitlines()
    assert [line for line in block.splitlines() if line not in said] == []


def test_the_page_shows_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "infra" / "README.md").read_text(encoding="utf-8")
    words = re.search(r"`python infra/size\.py (.+?)`", page)
    assert words is not None
    status, out, _ = told(capsys, *words[1].split())
    assert status == 0
    table, _, _ = out.partition("\n\n")
    assert f"```\n{table}\n```" in page
