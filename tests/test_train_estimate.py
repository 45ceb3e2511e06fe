"""The plan: what it says before a run is what the run then takes; what will not work is said with a remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import add_dataset
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from store.errors import MissingError, UsageError
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot
from store.writer import LakeWriter
from train.__main__ import app
from train.assembly import vocabulary_of
from train.cells import PROMPTS, Cells
from train.config import ModelConfig
from train.estimate import Sample, activations, count_parameters, look_at, made_up, operations, plan, sample_cells
from train.loop import Run
from train.model import CellModel
from train.objective import Objective, seen_cells
from train.settings import RunSettings
from train.sources import find_sources
from train.tokens import TokenSettings, make_tokens

SIZES = {"RNA": 300, "protein": 20}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 4000, SIZES)
        add_dataset(writer, "second", 1500, {"RNA": 300})
    create_snapshot(uri, "s", SnapshotSettings(seed=2))
    return uri


@pytest.fixture
def settings(lake: str, tmp_path: Path) -> RunSettings:
    values = {
        "lake": lake,
        "snapshot": "s",
        "output": str(tmp_path),
        "steps": 12,
        "workers": 1,
        "model": {"width": 64, "layers": 3, "heads": 4},
        "data": {"global_batch": 64, "block": 512, "window": 2, "tokens": 64},
        "optim": {"warmup_steps": 2},
    }
    return parse_settings(RunSettings, values, where="test")


def changed(settings: RunSettings, **sections: dict[str, object]) -> RunSettings:
    """Return settings with other values in some sections; "run" is the outermost."""
    outer = sections.pop("run", {})
    parts = {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    return settings.model_copy(update=parts | outer)


def first_batch(run: Run) -> Cells:
    batches = run.stream.steps(0, 1, rank=0, world=1)
    (batch,) = batches
    assert isinstance(batch, Cells)
    return batch


def kept(run: Run, batch: Cells, *, half: bool) -> int:
    """Count the bytes that autograd keeps of a step, without the model's own."""
    own = {part.untyped_storage().data_ptr() for part in (*run.plain.parameters(), *run.plain.buffers())}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        run.objective(run.plain, run.plain, batch, 0)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_parameters_are_those_of_the_model_that_the_run_builds(settings: RunSettings, tmp_path: Path) -> None:
    sets = tmp_path / "sets.gmt"
    lines = [f"set{n}\t.\t" + "\t".join(f"RNA{g:04d}" for g in range(n, n + 20)) for n in range(4)]
    sets.write_text("\n".join(lines))
    for told in (
        settings,
        changed(settings, knowledge={"sets": (str(sets),)}, model={"pathways": 2, "attention": "hybrid"}),
        changed(settings, model={"types": False, "likelihood": {"RNA": "poisson"}, "query_layers": 0}),
    ):
        run = Run(told, 1)
        found = plan(told).parameters
        assert found.all == sum(part.numel() for part in run.plain.parameters())
        assert found == count_parameters(run.plain)


def test_blocks_and_tables_are_counted_apart() -> None:
    config = ModelConfig({"RNA": 1000}, {"tissue": 3}, 5, width=16, layers=2, heads=2, query_layers=1)
    found = count_parameters(CellModel(config))
    assert found.blocks == 3 * (10 * 16 * 16 + 2 * 16 + 2 * 8)
    labels = 2 * 5 + 3 + 7  # targets in prompts and in decoders, tissues, tasks
    assert found.tables == 16 * (1001 + 64 + 1 + labels) + 1000 * (2 * 16 + 2)


@pytest.mark.parametrize("tokens", [32, 512])
def test_tokens_of_an_epoch_are_those_that_a_streamed_epoch_has(settings: RunSettings, tokens: int) -> None:
    settings = changed(settings, data={"tokens": tokens})
    run = Run(settings, 1)
    n_tokens = n_cells = n_steps = 0
    for step, batch in enumerate(run.stream.epoch(0)):
        offsets, seen = run.plain.config.offsets, seen_cells(batch)
        made = make_tokens(batch, offsets, run.objective.settings, chance=(0, step), seen=seen)
        n_tokens, n_cells, n_steps = n_tokens + int(made.valid_CL.sum()), n_cells + batch.n_cells, step + 1
    found = plan(settings)
    assert (found.cells, found.steps_per_epoch) == (n_cells, n_steps)
    assert found.tokens_per_epoch == pytest.approx(n_tokens, rel=0.02)
    assert found.tokens_per_step == pytest.approx(n_tokens / n_cells * 64, rel=0.02)
    assert found.epochs == 12 / n_steps


def test_weights_gradients_and_moments_are_those_of_an_optimizer_that_stepped(settings: RunSettings) -> None:
    run = Run(settings, 1)
    loss, *_ = run.objective(run.model, run.plain, first_batch(run), 0)
    run.accelerator.backward(loss.total)
    run.optimizer.step()
    parts = list(run.plain.parameters())
    states = run.optimizer.optimizer.state.values()
    found = plan(settings).memory
    assert found.weights == sum(part.nbytes for part in parts)
    assert found.gradients == sum(part.grad.nbytes for part in parts if part.grad is not None)
    assert found.moments == sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert found.known >= sum(part.nbytes for part in run.plain.buffers())
    sizes = ("weights", "gradients", "moments", "copies", "known", "activations")
    assert found.device == sum(getattr(found, name) for name in sizes)
    assert found.windows == 512 * 2**20


@pytest.mark.parametrize("attention", ["full", "hybrid"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")  # torch, of its norms in half precision on CPU
def test_activations_are_about_what_autograd_keeps_of_a_step(settings: RunSettings, half: bool, attention: str) -> None:
    settings = changed(settings, model={"attention": attention})
    run = Run(settings, 1)
    config = run.plain.config
    sample = sample_cells(find_sources({open_snapshot(settings.lake, "s"): 1.0}, "train"), tuple(SIZES))
    seen = look_at(sample, config, run.objective.settings, settings.data.queries, 0)
    found = activations(config, seen, 64, "cpu", half=half)
    assert found == pytest.approx(kept(run, first_batch(run), half=half), rel=0.15)
    assert activations(config, seen, 64, "cpu", half=half, recompute=True) < 0.7 * found
    assert activations(config, seen, 16, "cpu", half=half) == pytest.approx(found / 4)


def test_operations_are_about_what_torch_counts() -> None:
    config = ModelConfig({"RNA": 400}, dict.fromkeys(PROMPTS, 3), 5, width=64, layers=3, query_layers=2)
    sample = Sample(np.full((1, 50), 200), np.ones((1, 50), bool))
    tokens = TokenSettings(budget=60, hide=(0.5, 0.5), drop_measurement=0.0)  # all cells are equally long: no padding
    seen = look_at(sample, config, tokens, 16, 0)
    settings = parse_settings(RunSettings, {"snapshot": "s"}, where="test")
    model, cells = CellModel(config), made_up(settings, config, sample, 8)
    objective = Objective({"RNA": np.ones((1, 400), bool)}, tokens, 0, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # other backends are not counted
        loss, *_ = objective(model, model, cells, 0)
        torch.autograd.backward(loss.total)
    assert 8 * operations(model, seen) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_a_cell_shows_is_what_its_chances_and_the_budget_leave() -> None:
    config = ModelConfig({"RNA": 1000}, {"tissue": 3}, 5, width=16, heads=2, bottlenecks=4)
    sample = Sample(np.full((1, 50), 400), np.ones((1, 50), bool))
    half = TokenSettings(budget=1000, hide=(0.5, 0.5), drop_measurement=0.0)
    assert look_at(sample, config, half, 16, 0).tokens == pytest.approx(200, rel=0.005)
    full = look_at(sample, config, replace(half, budget=30), 16, 0)
    head = 1 + 7  # a summary, a field, perturbation, numbers, depths, and three that ask
    assert (full.tokens, full.places, full.hubs) == pytest.approx((30, head + 4 + 30, head + 4))
    assert (full.joint, full.within, full.between) == pytest.approx((42**2, head**2 + 34**2, 12**2))
    assert full.queries == pytest.approx(8 + 8 * 0.6)
    assert look_at(sample, config, replace(half, drop_measurement=1.0), 16, 0).places == head


def test_a_checkpoint_and_a_state_take_the_disk_that_was_said(settings: RunSettings, tmp_path: Path) -> None:
    found = plan(settings)
    Run(settings, 1).train()
    served = sum(path.stat().st_size for path in (tmp_path / "run/checkpoint").iterdir())
    (state,) = (tmp_path / "run/state").iterdir()
    saved = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    assert found.checkpoint_bytes == pytest.approx(served, rel=0.05)
    assert found.state_bytes == pytest.approx(saved, rel=0.15)


def test_workers_under_fsdp_share_weights_gradients_and_moments(settings: RunSettings) -> None:
    alone = plan(settings).memory
    four = changed(settings, run={"workers": 4})
    ddp, fsdp = plan(four).memory, plan(changed(four, run={"parallel": "fsdp"})).memory
    assert (ddp.weights, ddp.copies) == (alone.weights, alone.weights)  # gradients are exchanged in buckets
    assert fsdp.staged == ddp.staged // 4
    for name in ("weights", "gradients", "moments"):
        assert getattr(fsdp, name) == pytest.approx(getattr(alone, name) / 4, rel=1e-4)
    assert ddp.activations == fsdp.activations == pytest.approx(alone.activations / 4, rel=0.01)
    micro = plan(changed(settings, data={"micro_batch": 16})).memory
    assert micro.activations == ddp.activations


def test_hours_follow_workers_arithmetic_and_its_share(settings: RunSettings) -> None:
    settings = changed(settings, run={"precision": "bf16"})
    found = plan(settings)
    assert found.mfu == 0.35
    assert found.hours == pytest.approx(found.operations * 12 / (989e12 * 0.35) / 3600)
    assert plan(changed(settings, run={"workers": 2})).hours == pytest.approx(found.hours / 2)
    assert plan(settings, mfu=0.07).hours == pytest.approx(5 * found.hours)
    assert plan(settings, "a100").hours == pytest.approx(found.hours * 989 / 312)
    assert 1.1 < plan(changed(settings, run={"recompute": True})).hours / found.hours < 1.34
    assert any("35% of the 989 TFLOP/s of a h100" in one for one in found.assumptions)


def test_steps_of_the_real_model_are_timed_on_this_machine(settings: RunSettings) -> None:
    found = plan(changed(settings, data={"global_batch": 8}), "cpu")
    longer = plan(changed(settings, data={"global_batch": 8}, model={"layers": 24}), "h100", measure=True)
    assert found.mfu is longer.mfu is None
    assert 0 < found.seconds_per_step < longer.seconds_per_step
    assert found.hours == pytest.approx(found.seconds_per_step * 12 / 3600)
    assert "timed on this machine" in found.assumptions[-1]


def test_what_does_not_fit_is_a_warning_with_a_remedy(settings: RunSettings) -> None:
    settings = changed(settings, run={"precision": "bf16"})
    assert plan(settings).warnings == ()
    wide = changed(settings, model={"width": 8192, "layers": 12, "heads": 64})
    (said,) = plan(wide).warnings
    assert "a worker on a h100 would need" in said
    assert "take parallel = 'fsdp' with several workers" in said
    assert plan(changed(wide, run={"parallel": "fsdp", "workers": 64}, data={"micro_batch": 1})).warnings == ()
    many = changed(settings, model={"width": 1024, "layers": 48}, data={"global_batch": 2048})
    (said,) = plan(many).warnings
    assert "a smaller micro batch (data.micro_batch; 2,048 cells at once now), or recompute = true" in said
    assert plan(changed(many, data={"micro_batch": 64})).warnings == ()
    (said,) = plan(changed(settings, run={"precision": "no"})).warnings
    assert "set precision = 'bf16'" in said
    most = sum(len(part.feature_id) for part in vocabulary_of(open_snapshot(settings.lake, settings.snapshot)).values())
    assert plan(changed(settings, data={"tokens": most})).warnings == ()
    (said,) = plan(changed(settings, data={"tokens": 10**8})).warnings
    assert said == f"data.tokens = 100,000,000: a cell has {most:,} features at most, and takes no more tokens"


def test_what_cannot_be_planned_is_refused(settings: RunSettings) -> None:
    with pytest.raises(UsageError, match="device 'b900' is none of: h100, h200, a100, cpu"):
        plan(settings, "b900")
    with pytest.raises(UsageError, match="no cell is in split 'validation'"):
        plan(changed(settings, data={"split": "validation"}))
    with pytest.raises(UsageError, match=r"mfu=0\.5 has no meaning where steps are timed"):
        plan(settings, "cpu", mfu=0.5)
    with pytest.raises(UsageError, match="'fp16' needs a GPU"):
        plan(changed(settings, run={"precision": "fp16"}), "cpu")
    with pytest.raises(MissingError, match="no snapshot 'none'"):
        plan(changed(settings, run={"snapshot": "none"}))
    with pytest.raises(MissingError, match=r"none\.gmt: no such file"):
        plan(changed(settings, knowledge={"sets": ("none.gmt",)}))


def test_the_command_answers_people_and_programs_and_leaves_nothing(lake: str, tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(f'lake = "{lake}"\nsnapshot = "s"\noutput = "{tmp_path}/runs"\nprecision = "bf16"\n')
    words = ["plan", str(recipe), "--set", "model.width=32", "--device", "h200"]
    answered = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    found = json.loads(answered.stdout)
    assert (found["schema"], found["device"], found["mfu"]) == ("train-plan/v1", "h200", 0.35)
    assert found["memory"]["moments"] == 8 * found["parameters"]["all"]
    told = CliRunner().invoke(app, [*words, "--mfu", "0.2"], catch_exceptions=False).stderr
    assert f"{found['parameters']['all']:,}" in told
    assert "assumed: hours: 20% of the 989 TFLOP/s" in told
    assert not (tmp_path / "runs").exists()
