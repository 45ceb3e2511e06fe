"""Say how much a lake of so many cells needs: ``python infra/size.py --cells 1e6 100e6 1e9``.

Reckons with the costs of ``costs.toml``, measured on one small machine or assumed, and says which; ``--set`` changes
one. Time of a core is proportional to non-zeros, and so are bytes; what does not grow like that is told below the
table. For each step the fewest nodes are taken with which it ends within ``--hours``. ``--plan FILE`` takes the model
and its speed from what ``python -m train plan RUN.toml --json`` said, in place of ``--width`` and ``--layers``.
``--json`` answers with one JSON object. Prices are examples.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COSTS = Path(__file__).parent / "costs.toml"
Values = Mapping[str, float]
"""A number for each cost, by its dotted name."""
SHARES = ("train.mfu", "serve.http_share", "serve.mfu", "node.efficiency")
"""Costs that are a part of something, at most all of it."""
MOST = 1e13
"""What is asked is below it: beyond, every answer would be a number that nobody reads."""
OF_THE_PLAN = ("width", "layers", "tokens")


@dataclass(frozen=True)
class Cost:
    """A cost: its value, the range in which it may lie, and where it comes from."""

    value: float
    low: float
    high: float
    measured: bool
    source: str


@dataclass(frozen=True)
class Ask:
    """What is asked.

    Attributes:
        cells: Cells of the lake.
        nonzeros: Values that are not zero, of a cell.
        genes: Features of the vocabulary.
        datasets: That are ingested.
        hours: In which each step has to end.
        epochs: How often training takes each cell.
        width: Of the model.
        layers: Blocks of its encoder.
        tokens: That it reads of a cell at most.
        rate: Cells a second that are served.
        months: For which what is stored is paid.
        weights: Of the model, where a plan tells; 0 reckons them.
        operations: For a cell of training, where a plan tells; 0 reckons them.
    """

    cells: int
    nonzeros: float = 2_000
    genes: int = 36_000
    datasets: int = 0
    hours: float = 24
    epochs: float = 1
    width: int = 512
    layers: int = 12
    tokens: int = 2_048
    rate: float = 1_000
    months: float = 1
    weights: float = 0
    operations: float = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("datasets", "weights", "operations") else None
            if not math.isfinite(value) or value < 0 or (value == 0 and least is None):
                raise ValueError(f"{name}={value:g}: a number above 0 is needed")
            if value >= MOST:
                raise ValueError(f"{name}={value:g} is too large to reckon with: less than {MOST:g} is needed")
        if self.datasets > self.cells:
            raise ValueError(f"datasets={self.datasets:,}: {self.cells:,} cells are in no more datasets than cells")

    @property
    def n_datasets(self) -> int:
        """Datasets; 100,000 cells each where nothing is said."""
        return self.datasets or max(1, math.ceil(self.cells / 100_000))

    @property
    def n_nonzeros(self) -> float:
        """Non-zeros of the lake."""
        return self.cells * self.nonzeros

    @property
    def n_weights(self) -> float:
        """Weights: 10 width² for each block, the query decoder's too, 7 beside them, and three tables of features."""
        return self.weights or (10 * (self.layers + 1) + 7) * self.width**2 + 3 * self.genes * self.width

    @property
    def n_read(self) -> float:
        """Tokens that are read of a cell."""
        return min(self.nonzeros, self.tokens)

    @property
    def n_operations(self) -> float:
        """Operations for a cell, forward and backward: 6 for each weight and token, 12 for width and pair of tokens.

        Of the query decoder are counted keys and values of what is read; two tables of features serve as decoders.
        """
        blocks = 6 * (10 * self.layers + 2) * self.width**2 * self.n_read
        pairs = 12 * self.width * self.layers * self.n_read**2
        return self.operations or blocks + pairs + 6 * 2 * self.genes * self.width


@dataclass(frozen=True)
class Step:
    """A step of the road: work, how many machines it needs, how long they are busy.

    Attributes:
        work_hours: Of one core or GPU that is used as well as was measured or assumed.
        machines: Nodes or GPUs.
        hours: That they take together.
        money: What they cost.
        in_time: Do they end within what was asked?
    """

    work_hours: float
    machines: int
    hours: float
    money: float
    in_time: bool


@dataclass(frozen=True)
class Size:
    """What is needed.

    Attributes:
        ingest: On CPU nodes.
        snapshot: On CPU nodes.
        train: On GPUs.
        train_core_hours: What the same training would take of CPU cores.
        stream_cells_s: Cells a second that a core can stream.
        gpu_cells_s: That a GPU trains on.
        cores_per_gpu: Cores that feed it.
        copy_cells_s: Cells a second that a copy of the server on one CPU thread answers.
        copies: Copies that answer the rate that was asked.
        gpu_copies: The same where copies have a GPU each.
        lake_bytes: Of counts.
        snapshot_bytes: Of counts.
        spill_bytes: While a snapshot is made.
        checkpoint_bytes: Of a checkpoint and of training states that are kept.
        ranges: That a snapshot's second pass fetches.
        storage_money: For the months, without the spill.
        money: Of ingest, snapshot, train and storage; a server costs by the hour.
    """

    ingest: Step
    snapshot: Step
    train: Step
    train_core_hours: float
    stream_cells_s: float
    gpu_cells_s: float
    cores_per_gpu: float
    copy_cells_s: float
    copies: int
    gpu_copies: int
    lake_bytes: float
    snapshot_bytes: float
    spill_bytes: float
    checkpoint_bytes: float
    ranges: float
    storage_money: float
    money: float


def read_costs(path: Path = COSTS) -> dict[str, Cost]:
    """Read the costs.

    Raises:
        ValueError: A cost lacks something, or lies outside its range.
    """
    found = {}
    for group, costs in tomllib.loads(path.read_text(encoding="utf-8")).items():
        for key, cost in costs.items():
            name = f"{group}.{key}"
            kinds = {"measured", "assumed"} & cost.keys()
            if len(kinds) != 1 or cost.keys() - kinds != {"value", "range"}:
                raise ValueError(f"{path.name}: {name}: value, range and either measured or assumed are needed")
            low, high = cost["range"]
            if not 0 < low <= cost["value"] <= high:
                raise ValueError(f"{path.name}: {name}: value {cost['value']} is not within its range {low} to {high}")
            (kind,) = kinds
            found[name] = Cost(cost["value"], low, high, kind == "measured", cost[kind])
    return found


def put(costs: Mapping[str, Cost], changes: Sequence[str]) -> dict[str, Cost]:
    """Return the costs with some that the user knows better.

    Raises:
        ValueError: A change names no cost, or has no number above 0, or a share above 1.
    """
    found = dict(costs)
    for change in changes:
        name, _, text = change.partition("=")
        if name not in costs:
            near = difflib.get_close_matches(name, costs, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(costs)}"
            raise ValueError(f"--set {change}: there is no cost {name!r}; {hint}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"--set {change}: a number above 0 is needed")
        if name in SHARES and value > 1:
            raise ValueError(f"--set {change}: a share is at most 1; did you mean {value / 100:g}?")
        found[name] = Cost(value, value, value, False, "said by --set")
    return found


def work_s(ask: Ask, values: Values) -> dict[str, float]:
    """Return the seconds of one core that ingestion and snapshot take, without start-up."""
    ranges = _ranges(ask, values)
    return {
        "ingest": ask.n_nonzeros * values["ingest.core_s_per_nonzero"],
        "snapshot": ask.n_nonzeros * values["snapshot.core_s_per_nonzero"] + ranges * values["snapshot.range_s"],
    }


def _ranges(ask: Ask, values: Values) -> float:
    """Return how many pieces the two passes of a snapshot hand over: each task of one to each of the other."""
    return max(1.0, ask.n_nonzeros / values["snapshot.values_per_task"]) ** 2


def _on_nodes(work: float, start: float, serial: float, ask: Ask, values: Values) -> Step:
    rate = values["node.cores"] * values["node.efficiency"]
    room = 3600 * ask.hours - start
    n_nodes = max(1, math.ceil(work / rate / room)) if room > 0 else 1
    hours = (start + max(work / rate / n_nodes, serial)) / 3600
    return Step(work / 3600, n_nodes, hours, n_nodes * hours * values["price.cpu_node_hour"], hours <= ask.hours)


def size(ask: Ask, values: Values) -> Size:
    """Reckon what is needed."""
    work = work_s(ask, values)
    ingest = _on_nodes(
        work["ingest"], values["ingest.start_s"], ask.n_datasets * values["ingest.dataset_s"], ask, values
    )
    snapshot = _on_nodes(work["snapshot"], values["snapshot.start_s"], 0.0, ask, values)
    gpu_cells_s = values["train.gpu_operations_s"] * values["train.mfu"] / ask.n_operations
    gpu_hours = ask.cells * ask.epochs / gpu_cells_s / 3600
    n_gpus = max(1, math.ceil(gpu_hours / ask.hours))
    train = Step(gpu_hours, n_gpus, gpu_hours / n_gpus, gpu_hours * values["price.gpu_hour"], True)
    stream_cells_s = 1 / (ask.nonzeros * values["stream.core_s_per_nonzero"])
    cpu_operations_s = values["cpu.operations_s"] * ask.width / (ask.width + values["cpu.half_width"])
    copy_cells_s = values["serve.http_share"] * cpu_operations_s / (ask.n_operations / 3)
    gpu_copy = values["serve.mfu"] * values["train.gpu_operations_s"] / (ask.n_operations / 3)
    lake = ask.n_nonzeros * values["storage.lake_bytes_per_nonzero"]
    shuffled = ask.n_nonzeros * values["storage.snapshot_bytes_per_nonzero"]
    states = values["storage.states_kept"] * values["storage.state_bytes_per_weight"]
    checkpoint = ask.n_weights * (4 + states)
    stored = (lake + shuffled + checkpoint) / 1e12 * ask.months * values["price.tb_month"]
    return Size(
        ingest=ingest,
        snapshot=snapshot,
        train=train,
        train_core_hours=ask.cells * ask.epochs * ask.n_operations / cpu_operations_s / 3600,
        stream_cells_s=stream_cells_s,
        gpu_cells_s=gpu_cells_s,
        cores_per_gpu=gpu_cells_s / stream_cells_s,
        copy_cells_s=copy_cells_s,
        copies=math.ceil(ask.rate / copy_cells_s),
        gpu_copies=math.ceil(ask.rate / gpu_copy),
        lake_bytes=lake,
        snapshot_bytes=shuffled,
        spill_bytes=ask.n_nonzeros * values["storage.spill_bytes_per_nonzero"],
        checkpoint_bytes=checkpoint,
        ranges=_ranges(ask, values),
        storage_money=stored,
        money=ingest.money + snapshot.money + train.money + stored,
    )


def values_of(costs: Mapping[str, Cost]) -> dict[str, float]:
    """Return the numbers to reckon with."""
    return {name: cost.value for name, cost in costs.items()}


def largest_uncertainty(ask: Ask, costs: Mapping[str, Cost]) -> tuple[str, float, float]:
    """Return the cost whose range moves the whole sum most, and the lowest and highest sum that it makes."""
    spans = {}
    for name, cost in costs.items():
        sums = [size(ask, values_of(costs) | {name: end}).money for end in (cost.low, cost.high)]
        spans[name] = (min(sums), max(sums))
    name = max(spans, key=lambda name: spans[name][1] - spans[name][0])
    return (name, *spans[name])


def not_linear(ask: Ask, found: Size, values: Values) -> list[str]:
    """Say what does not grow in proportion to the cells."""
    serial = ask.n_datasets * values["ingest.dataset_s"] / 3600
    starts = [values[f"{name}.start_s"] for name in ("ingest", "snapshot")]
    said = [
        f"start-up: {starts[0]:g} s of an ingestion and {starts[1]:g} s of a snapshot, whatever their size",
        f"commits: one driver, one dataset after the other: {ask.n_datasets:,} take {serial:,.2f} h, which more nodes "
        "do not shorten; the catalog that each reads grows with them",
        f"shuffling: {found.ranges:,.0f} pieces go from the first pass to the second; ten times the cells, a hundred "
        "times the pieces",
        "fragments of X grow with the cells, about one for 16,384 of them; those of the tables are merged on the way",
    ]
    if not found.ingest.in_time:
        said.append(
            f"ingest does not end within {ask.hours:g} h: commits take {serial:,.1f} h; take fewer, larger datasets"
        )
    share = found.ranges * values["snapshot.range_s"] / 3600 / found.snapshot.work_hours
    if share > 0.5:
        said.append(
            f"{share:.0%} of the snapshot's work would be fetching pieces: make a snapshot for each part of the cells, "
            "and mix them (docs/stream.md)"
        )
    return said


# ------------------------------------------------------------------------------------------------------ what is said
def _bytes(n_bytes: float) -> str:
    for unit in ("MB", "GB", "TB"):
        n_bytes /= 1e6 if unit == "MB" else 1e3
        if n_bytes < 1000 or unit == "TB":
            break
    return f"{n_bytes:,.3g} {unit}" if n_bytes < 1000 else f"{n_bytes:,.0f} {unit}"


def _few(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _step(step: Step, what: str) -> str:
    late = "" if step.in_time else " (late)"
    took = f"{_few(step.hours)} h" if step.hours >= 1 else f"{_few(60 * step.hours)} min"
    return f"{step.machines:,} {what}{'s' * (step.machines > 1)}, {took}{late}"


def rows(ask: Ask, found: Size) -> list[tuple[str, str]]:
    """Write what is needed as pairs of what and how much."""
    return [
        ("datasets", f"{ask.n_datasets:,}"),
        ("ingest, core-hours", _few(found.ingest.work_hours)),
        ("  machines and time", _step(found.ingest, "node")),
        ("snapshot, core-hours", _few(found.snapshot.work_hours)),
        ("  machines and time", _step(found.snapshot, "node")),
        ("train, GPU-hours", _few(found.train.work_hours)),
        ("  machines and time", _step(found.train, "GPU")),
        ("  on CPU, core-hours", _few(found.train_core_hours)),
        ("stream, cells/s of a core", _few(found.stream_cells_s)),
        ("  that a GPU trains on", _few(found.gpu_cells_s)),
        ("  cores to feed a GPU", _few(found.cores_per_gpu)),
        (f"serve {ask.rate:g} cells/s, copies", f"{found.copies:,} of a CPU thread, or {found.gpu_copies:,} of a GPU"),
        ("lake", _bytes(found.lake_bytes)),
        ("snapshot", _bytes(found.snapshot_bytes)),
        ("  while it is made, also", _bytes(found.spill_bytes)),
        ("checkpoint and states", _bytes(found.checkpoint_bytes)),
        ("money: ingest", _few(found.ingest.money)),
        ("  snapshot", _few(found.snapshot.money)),
        ("  train", _few(found.train.money)),
        (f"  storage, {ask.months:g} month{'s' * (ask.months != 1)}", _few(found.storage_money)),
        ("  together", _few(found.money)),
    ]


def report(asks: Sequence[Ask], costs: Mapping[str, Cost], warnings: Sequence[str] = ()) -> str:
    """Write a column for each ask, what is not linear, what all of it rests on, and the plan's warnings."""
    values, first = values_of(costs), asks[0]
    columns = [rows(ask, size(ask, values)) for ask in asks]
    cells = [["cells", *(f"{ask.cells:,}" for ask in asks)]]
    cells += [[line[0][0], *(how_much for _, how_much in line)] for line in zip(*columns, strict=True)]
    wide = [max(len(row[place]) for row in cells) for place in range(len(asks) + 1)]
    said = ["  ".join(text.ljust(width) for text, width in zip(row, wide, strict=True)).rstrip() for row in cells]
    last = asks[-1]
    said += ["", *(f"warning of the plan: {one}" for one in warnings)] if warnings else []
    said += ["", "each step has the fewest machines with which it ends in time"]
    said += [f"not in proportion to the cells ({last.cells:,}):"]
    said += [f"- {line}" for line in not_linear(last, size(last, values), values)]
    said += ["", "assumptions:", *(f"- {line}" for line in _taken_for_granted(first))]
    for name, cost in costs.items():
        span = f" ({cost.low:g} to {cost.high:g})" if cost.low < cost.high else ""
        said.append(f"- {name} = {cost.value:g}{span}, {'measured' if cost.measured else 'assumed'}: {cost.source}")
    said.append("")
    for ask in asks:
        name, low, high = largest_uncertainty(ask, costs)
        span = f"over its range the sum goes from {_few(low)} to {_few(high)}"
        said.append(f"largest uncertainty for {ask.cells:,} cells: {name}; {span}")
    return "\n".join(said)


def _taken_for_granted(ask: Ask) -> list[str]:
    how = "as the plan counts them" if ask.operations else "those of blocks and decoders (--plan counts all)"
    return [
        f"{ask.nonzeros:,.0f} non-zeros a cell, {ask.genes:,} features, raw counts; time and bytes in proportion to "
        "non-zeros; the columns of obs are not counted",
        f"each step ends within {ask.hours:g} h",
        f"a model of {_few(ask.n_weights / 1e6)} million weights reads {ask.n_read:,.0f} tokens of a cell, all that it "
        f"has up to {ask.tokens:,}; {ask.epochs:g} epoch{'s' * (ask.epochs != 1)}",
        f"{ask.n_operations:.3g} operations for a cell of training, {how}; a third of them where it is served",
        "waiting for data or other workers, evaluation and failures are not counted",
    ]


def as_json(asks: Sequence[Ask], costs: Mapping[str, Cost], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return the same as plain values."""
    values, sizes = values_of(costs), []
    for ask in asks:
        found = size(ask, values)
        name, low, high = largest_uncertainty(ask, costs)
        sizes.append(
            {"ask": asdict(ask), "size": asdict(found), "not_linear": not_linear(ask, found, values)}
            | {"largest_uncertainty": {"cost": name, "money": [low, high]}}
        )
    told = {name: asdict(cost) for name, cost in costs.items()}
    return {"schema": "size/v1", "sizes": sizes, "costs": told, "warnings": list(warnings)}


def _cells(text: str) -> int:
    try:
        value = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = math.nan
    if not (1 <= value < 1e13) or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of cells; examples: 250000, 100e6")
    return int(value)


def _above_0(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise TypeError(f"{value!r} is no number above 0")
    return value


@dataclass(frozen=True)
class Planned:
    """What a plan says of a model.

    Attributes:
        model: Fields of an :class:`Ask`.
        costs: How fast a GPU trains it; empty where steps were timed, on whatever machine that was.
        warnings: Sentences: what will not work, and what to do.
    """

    model: Mapping[str, float]
    costs: Mapping[str, Cost]
    warnings: Sequence[str]


def of_plan(path: Path) -> Planned:
    """Take a model and its speed from what ``python -m train plan --json`` said.

    Raises:
        ValueError: It is no plan.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        n_cells = _above_0(plan["cells_per_step"])
        model = {
            "width": _above_0(plan["width"]),
            "weights": _above_0(plan["parameters"]["all"]),
            "operations": _above_0(plan["operations"]) / n_cells,
            "tokens": math.ceil(_above_0(plan["tokens_per_step"]) / n_cells),
        }
        warnings, costs = [str(one) for one in plan["warnings"]], {}
        if plan["mfu"] is None:
            warnings.append("its steps were timed, on whatever machine: hours of a GPU rest on the costs, not on it")
        else:
            mfu = _above_0(plan["mfu"])
            used = _above_0(plan["operations"]) / (_above_0(plan["seconds_per_step"]) * _above_0(plan["workers"]))
            source = f"as the plan {path.name} takes it, for device {plan['device']}"
            for name, value in (("train.gpu_operations_s", used / mfu), ("train.mfu", mfu)):
                costs[name] = Cost(value, value, value, False, source)
        return Planned(model, costs, warnings)
    except (OSError, KeyError, TypeError, OverflowError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not what python -m train plan RUN.toml --json writes: {error!r}") from None


def main(words: Sequence[str] | None = None) -> int:
    """Answer; return the status to end with, 2 where what is asked makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=_cells, nargs="+", required=True, help="such as 1e6 100e6; a column each")
    for name, kind, text in (
        ("nonzeros", float, "values that are not zero, of a cell"),
        ("genes", int, "features of the vocabulary"),
        ("datasets", int, "datasets; left out: one for each 100,000 cells"),
        ("hours", float, "in which each step has to end"),
        ("epochs", float, "how often training takes each cell"),
        ("width", int, "of the model"),
        ("layers", int, "of the model"),
        ("tokens", int, "that the model reads of a cell at most"),
        ("rate", float, "cells a second to serve"),
        ("months", float, "for which storage is paid"),
    ):
        taken = f"{text} [{getattr(Ask, name)}]"
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=taken)
    parser.add_argument("--plan", type=Path, help="what python -m train plan RUN.toml --json said")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="a cost that you know better"
    )
    parser.add_argument("--json", action="store_true", help="answer with one JSON object")
    options = vars(parser.parse_args(words))
    try:
        changes, plan, told, sizes = (options.pop(name) for name in ("set", "plan", "json", "cells"))
        planned = of_plan(plan) if plan else Planned({}, {}, ())
        twice = [f"--{name}" for name in OF_THE_PLAN if plan and name in options]
        if twice:
            raise ValueError(f"{', '.join(twice)}: {plan} says it; leave one out, or plan that model")
        costs = put(read_costs() | planned.costs, changes)
        asks = [Ask(cells=n_cells, **options, **planned.model) for n_cells in sizes]
        if asks[0].nonzeros > asks[0].genes:
            raise ValueError(
                f"nonzeros={asks[0].nonzeros:g}: a cell has no more of them than there are features, "
                f"genes={asks[0].genes:g}; say fewer, or more --genes"
            )
        warnings = planned.warnings
        said = json.dumps(as_json(asks, costs, warnings), allow_nan=False) if told else report(asks, costs, warnings)
    except ValueError as error:
        print(f"size: {error}", file=sys.stderr)
        return 2
    except (OverflowError, ZeroDivisionError) as error:
        print(f"size: the numbers are too large or too small to reckon with ({error})", file=sys.stderr)
        return 2
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
