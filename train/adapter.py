"""This module adapts a trained model with few weights: low-rank adapters beside linear layers (Hu et al. 2022; peft).

The trunk stays as it is, bit for bit; an adapter is a small file that says which checkpoint it belongs to. Several can
be attached to one base by name, and chosen in turn: the base's weights are in memory once.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from store.errors import InputRefused, UsageError
from train.checkpoint import MANIFEST, read_manifest, sha256, write_manifest
from train.model import CellModel

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

WEIGHTS = "adapter.safetensors"
DEFAULT = "default"
"""The name of an adapter that is alone, and of every adapter in its file."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "mix.0", "mix.2", "features")
"""The layers that are adapted: attention, feed-forward, and the decoders' way from the summary to features."""


@dataclass(frozen=True)
class AdapterSettings:
    """Sizes of an adapter.

    Attributes:
        rank: Of what is added to each layer.
        alpha: What is added is scaled by alpha / rank.
    """

    rank: int = 8
    alpha: int = 16


def adapted(model: CellModel, settings: AdapterSettings, seed: int = 0) -> CellModel:
    """Return a copy of a model with an adapter that changes nothing yet; only the adapter's weights can learn.

    Args:
        model: Stays as it is.
        settings: Sizes.
        seed: Of the adapter's first weights: members of an ensemble begin differently.
    """
    return _learning(_grow(copy.deepcopy(model), settings, DEFAULT, seed))


def _learning(model: CellModel) -> CellModel:
    """Let the adapter that is alone be used and learn, and nothing else of the model learn."""
    use(model, DEFAULT)
    for key, weight in model.named_parameters():
        weight.requires_grad_(_is_of(key, DEFAULT))
    return model


def _grow(model: CellModel, settings: AdapterSettings, name: str, seed: int = 0) -> CellModel:
    """Put an adapter beside a model's layers, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    logging.getLogger("torchao").setLevel(logging.ERROR)  # peft imports it, and it warns of what only GPUs need
    names = "|".join(target.replace(".", r"\.") for target in TARGETS)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=rf"(.*\.)?({names})"
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant to be
        torch.manual_seed(seed)
        grown = inject_adapter_in_model(config, model, adapter_name=name)
    assert isinstance(grown, CellModel)
    return grown


def _is_of(key: str, name: str) -> bool:
    """Say whether a weight, by its key ``<layer>.lora_A.<name>.weight``, is the adapter's of this name."""
    parts = key.split(".")
    return len(parts) > 2 and parts[-3].startswith("lora_") and parts[-2] == name


def adapter_weights(model: CellModel, name: str = DEFAULT) -> dict[str, torch.Tensor]:
    """Return the weights of an adapted model that are the adapter's."""
    return {key: weight.detach() for key, weight in model.named_parameters() if _is_of(key, name)}


def share_of_weights(model: CellModel, name: str = DEFAULT) -> float:
    """Return how many weights an adapter has, as a share of those of the model that it stands beside."""
    trunk = sum(weight.numel() for key, weight in model.named_parameters() if "lora_" not in key)
    return sum(weight.numel() for weight in adapter_weights(model, name).values()) / trunk


def merged(model: CellModel) -> CellModel:
    """Return a plain model that answers as one does with the adapter that it uses, within float rounding."""
    name, grown = chosen(model), copy.deepcopy(model)
    if name is not None:
        for layer in _layers(grown):
            layer.merge(adapter_names=[name])
    plain = CellModel(model.config)
    plain.load_state_dict(
        {key.replace(".base_layer.", "."): weight for key, weight in grown.state_dict().items() if "lora_" not in key}
    )
    return plain.to(next(model.parameters()).device).eval()


# --------------------------------------------------------------------------------------------- several on one base
def attach(model: CellModel, adapters: Mapping[str, str | Path], base: dict[str, Any]) -> CellModel:
    """Return a model with several saved adapters, which uses none of them until :func:`use` chooses one.

    It holds no copy of the base: its weights lie where those of ``model`` lie, which is not changed.

    Args:
        model: The base, which may have attached adapters already.
        adapters: Name to folder; a name is letters, digits, "_" and "-".
        base: The manifest of the checkpoint.

    Raises:
        UsageError: A name that is taken or not a plain word.
        MissingError: There is no such adapter.
        InputRefused: It is damaged, or belongs to another checkpoint.
    """
    for name in adapters:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) or hasattr(torch.nn.ModuleDict(), name):
            raise UsageError(f"adapter name {name!r}: use letters, digits, '_' and '-', and no method's name")
        if name in attached(model):
            raise UsageError(f"adapter name {name!r} is taken; attached: {', '.join(attached(model))}")
    grown = _sharing(model)
    for name, folder in adapters.items():
        grown = _restore(grown, folder, base, name)
    use(grown, None)
    return grown.eval()


def use(model: CellModel, name: str | None) -> None:
    """Choose which attached adapter a model answers with; with None it answers bit for bit as the base does.

    Nothing is copied or added up, so this takes no time; it is the model's state: do not choose while another thread
    asks the same model.

    Raises:
        UsageError: No adapter of this name is attached.
    """
    known = attached(model)
    if name is not None and name not in known:
        raise UsageError(f"no adapter {name!r} is attached; there is {', '.join(known) or 'none'}")
    for layer in _layers(model):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter([name], inference_mode=True)


def attached(model: CellModel) -> list[str]:
    """Name a model's adapters, in alphabetical order."""
    return sorted({name for layer in _layers(model) for name in layer.lora_A})


def chosen(model: CellModel) -> str | None:
    """Name the adapter that a model answers with; None is the base alone."""
    layer = next(iter(_layers(model)), None)
    return None if layer is None or layer.disable_adapters else str(layer.active_adapters[0])


def _layers(model: CellModel) -> list[LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _sharing(model: CellModel) -> CellModel:
    """Return a model with modules of its own, whose weights are frozen and lie where the given one's lie."""
    same: dict[int, Any] = {id(part): part for part in model.buffers()}
    same |= {id(part): torch.nn.Parameter(part.detach(), requires_grad=False) for part in model.parameters()}
    return copy.deepcopy(model, same)


# ------------------------------------------------------------------------------------------------------------ files
def save_adapter(
    folder: Path,
    model: CellModel,
    settings: AdapterSettings,
    base: dict[str, Any],
    name: str = DEFAULT,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter: its weights, and last a manifest with its sizes and the SHA-256 of the model it belongs to.

    One that stands there is replaced.

    Args:
        folder: Where.
        model: An adapted model.
        settings: The sizes that it was adapted with.
        base: The manifest of the checkpoint.
        name: Which of its adapters.
        about: What else the manifest says: where it comes from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    weights = {_renamed(key, DEFAULT): part.contiguous() for key, part in adapter_weights(model, name).items()}
    save_file(weights, folder / WEIGHTS)
    values = dict(about or {}) | {"kind": "adapter", "base_sha256": base["model_sha256"], "adapter": asdict(settings)}
    sizes = {"n_weights": sum(part.numel() for part in weights.values()), "share": share_of_weights(model, name)}
    write_manifest(folder, values | sizes | {"adapter_sha256": sha256(folder / WEIGHTS)})
    return folder


def load_adapter(folder: str | Path, model: CellModel, base: dict[str, Any]) -> CellModel:
    """Return a copy of a model with a saved adapter, which can go on learning.

    Raises:
        MissingError: There is none.
        InputRefused: It is damaged, or belongs to another checkpoint.
    """
    return _learning(_restore(copy.deepcopy(model), folder, base, DEFAULT)).eval()


def _restore(model: CellModel, folder: str | Path, base: dict[str, Any], name: str) -> CellModel:
    """Put a saved adapter beside a model's layers, in place."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != "adapter" or WEIGHTS not in manifest["files"]:
        raise InputRefused(f"{folder}: not an adapter; a checkpoint is loaded by itself")
    made_for = str(manifest.get("base_sha256"))
    if made_for != base["model_sha256"]:
        raise InputRefused(
            f"{folder}: made for the checkpoint with model_sha256 {made_for[:12]}..., this one has "
            f"{base['model_sha256'][:12]}...; load that one, or train the adapter again"
        )
    try:
        grown = _grow(model, AdapterSettings(**manifest["adapter"]), name)
        weights = {_renamed(key, name): part for key, part in load_file(Path(folder) / WEIGHTS).items()}
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputRefused(f"{folder}: not an adapter of this version: {error}") from error
    if _shapes(weights) != _shapes(adapter_weights(grown, name)):  # before they are loaded: the base may be shared
        raise InputRefused(f"{folder}: its weights are not those of the model's layers; train the adapter again")
    grown.load_state_dict(weights, strict=False)
    return grown


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: part.shape for key, part in weights.items()}


def _renamed(key: str, name: str) -> str:
    """Return the key that a weight of an adapter has under another name."""
    parts = key.split(".")
    return ".".join([*parts[:-2], name, *parts[-1:]])
