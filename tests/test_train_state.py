"""Training states: whole or not at all, and what they were when the save began, whatever happens meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.state import States, valid_states


def trained(value: float, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    pairs = zip(one.state.values(), other.state.values(), strict=True)
    return all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for a, b in pairs for key in a)


def test_what_is_saved_is_what_was_there_when_the_save_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.state

    model, optimizer = trained(1.0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    states, write = States(tmp_path), train.state.dcp_save

    def slow(state: dict[str, object], **words: object) -> object:
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(-7.0)  # training goes on meanwhile
        for entry in optimizer.state.values():
            entry["exp_avg"].fill_(-7.0)
        return write(state, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(train.state, "dcp_save", slow)
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    states.save(model, optimizer, {"global_step": 2})
    states.finish()
    again, fresh = trained(0.0, steps=0)
    manifest = States(tmp_path).load(again, fresh)
    assert manifest is not None
    assert manifest["global_step"] == 2
    assert all(torch.equal(weight, before[name]) for name, weight in again.state_dict().items())
    assert all(torch.equal(e["exp_avg"], m) for e, m in zip(fresh.state.values(), moments, strict=True))
    assert all(int(entry["step"]) == 2 for entry in fresh.state.values())


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    states = States(tmp_path)
    states.save(model, optimizer, {"global_step": 2})
    states.finish()
    other, second = trained(5.0, steps=0)
    States(tmp_path).load(other, second)
    for part, way in ((model, optimizer), (other, second)):
        part(torch.full((1, 3), 0.3)).square().sum().backward()
        way.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert same(optimizer, second)


def test_a_torn_state_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    states = States(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        states.save(*trained(float(step), steps=1), {"global_step": step})
    states.finish()
    assert len(valid_states(tmp_path)) == 2
    newest = valid_states(tmp_path)[-1]
    torn = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    torn.write_bytes(torn.read_bytes()[:-9])
    (tmp_path / "step_000000009_half").mkdir()  # killed between upload and manifest
    resumed = States(tmp_path)
    manifest = resumed.load(*trained(0.0, steps=0))
    assert manifest is not None
    assert manifest["global_step"] == 2
    resumed.save(*trained(4.0, steps=1), {"global_step": 4})
    resumed.finish()
    assert not (tmp_path / "step_000000009_half").exists()


def flip(state: Path) -> None:
    """Change a bit of a state's weights."""
    victim = next(path for path in state.iterdir() if path.suffix == ".distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("_")[1]) for path in valid_states(folder)]


@pytest.mark.parametrize(("before", "goes_on"), [((100, 200), 100), ((200,), None)])
def test_a_damaged_newest_state_is_set_aside_and_new_ones_stay(
    tmp_path: Path, before: tuple[int, ...], goes_on: int | None
) -> None:
    states = States(tmp_path, keep_last=len(before))
    for step in before:
        states.save(*trained(float(step), steps=1), {"global_step": step})
    states.finish()
    flip(valid_states(tmp_path)[-1])
    resumed = States(tmp_path, keep_last=1)
    manifest = resumed.load(*trained(0.0, steps=0))
    assert (manifest and manifest["global_step"]) == goes_on
    assert [path.name.split("_")[2] for path in tmp_path.glob("damaged_*")] == ["000000200"]
    for step in (150, 160):
        resumed.save(*trained(4.0, steps=1), {"global_step": step})
        resumed.finish()
        assert steps(tmp_path) == [step]
    again = States(tmp_path).load(*trained(0.0, steps=0))
    assert again is not None
    assert again["global_step"] == 160


def test_the_state_just_written_is_never_removed(tmp_path: Path) -> None:
    states = States(tmp_path, keep_last=1)
    states.save(*trained(1.0, steps=1), {"global_step": 200})
    states.save(*trained(1.0, steps=1), {"global_step": 50})
    states.finish()
    assert 50 in steps(tmp_path)


def test_the_best_state_is_kept_beside_the_last_ones(tmp_path: Path) -> None:
    states = States(tmp_path, keep_last=1, keep_best=True)
    for step, loss in ((1, 0.9), (2, 0.5), (3, 0.7), (4, 0.8)):
        states.save(*trained(float(step), steps=1), {"global_step": step, "loss_test": loss})
    states.finish()
    assert [int(path.name.split("_")[1]) for path in valid_states(tmp_path)] == [2, 4]
    model, optimizer = trained(0.0, steps=0)
    best = states.load_best(model, optimizer)
    assert best is not None
    assert best["global_step"] == 2


@pytest.mark.parametrize("damaged", ["manifest", "weights"])
def test_a_damaged_best_state_is_set_aside_for_the_next_best(tmp_path: Path, damaged: str) -> None:
    states = States(tmp_path, keep_last=3, keep_best=True)
    for step, loss in ((1, 0.5), (2, 0.7), (3, 0.9)):
        states.save(*trained(float(step), steps=1), {"global_step": step, "loss_test": loss})
    states.finish()
    best = valid_states(tmp_path)[0]
    if damaged == "weights":
        flip(best)
    else:
        (best / "manifest.json").write_bytes((best / "manifest.json").read_bytes()[:50])
    states.save(*trained(4.0, steps=1), {"global_step": 4, "loss_test": 0.8})
    states.finish()
    model, optimizer = trained(0.0, steps=0)
    found = states.load_best(model, optimizer)
    assert found is not None
    assert found["global_step"] == 2
    assert torch.equal(model.weight, trained(2.0, steps=1)[0].weight)
    assert best not in valid_states(tmp_path)
    assert states.load_best(model, optimizer) == found


def test_what_stops_a_save_is_told_at_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.state

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "no space left on device")

    states = States(tmp_path)
    monkeypatch.setattr(train.state, "dcp_save", full)
    states.save(*trained(1.0), {"global_step": 1})
    with pytest.raises(OSError, match="no space left"):
        states.finish()
    assert valid_states(tmp_path) == []
