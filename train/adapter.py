"""This module adapts a trained model with few weights: low-rank adapters beside linear layers (Hu et al. 2022; peft).

The trunk stays as it is, bit for bit; an adapter is a small file that says which checkpoint it belongs to.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from store.errors import InputRefused
from train.checkpoint import read_manifest, sha256, write_manifest
from train.model import CellModel

WEIGHTS = "adapter.safetensors"
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
    from peft import LoraConfig, inject_adapter_in_model

    names = "|".join(name.replace(".", r"\.") for name in TARGETS)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=rf"(.*\.)?({names})"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = inject_adapter_in_model(config, copy.deepcopy(model))
    assert isinstance(grown, CellModel)
    for name, weight in grown.named_parameters():
        weight.requires_grad_("lora_" in name)
    return grown


def adapter_weights(model: CellModel) -> dict[str, torch.Tensor]:
    """Return the weights of an adapted model that are the adapter's."""
    return {name: weight.detach() for name, weight in model.named_parameters() if "lora_" in name}


def merged(model: CellModel) -> CellModel:
    """Return a plain model that answers as an adapted one does, within float rounding."""
    from peft.tuners.lora import LoraLayer

    grown = copy.deepcopy(model)
    for module in grown.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    plain = CellModel(model.config)
    plain.load_state_dict(
        {
            name.replace(".base_layer.", "."): weight
            for name, weight in grown.state_dict().items()
            if "lora_" not in name
        }
    )
    return plain.eval()


def save_adapter(folder: Path, model: CellModel, settings: AdapterSettings, base: dict[str, Any]) -> Path:
    """Write an adapter: its weights, and last a manifest with its sizes and the SHA-256 of the model it belongs to.

    Args:
        folder: Where.
        model: An adapted model.
        settings: The sizes that it was adapted with.
        base: The manifest of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in adapter_weights(model).items()}, folder / WEIGHTS)
    values = {"kind": "adapter", "base_sha256": base["model_sha256"], "adapter": asdict(settings)}
    write_manifest(folder, values | {"adapter_sha256": sha256(folder / WEIGHTS)})
    return folder


def load_adapter(folder: str | Path, model: CellModel, base: dict[str, Any]) -> CellModel:
    """Return a copy of a model with a saved adapter.

    Raises:
        MissingError: There is none.
        InputRefused: It is damaged, or belongs to another checkpoint.
    """
    manifest = read_manifest(folder)
    if manifest.get("kind") != "adapter" or WEIGHTS not in manifest["files"]:
        raise InputRefused(f"{folder}: not an adapter; a checkpoint is loaded by itself")
    if manifest["base_sha256"] != base["model_sha256"]:
        raise InputRefused(
            f"{folder}: made for the checkpoint with model_sha256 {manifest['base_sha256'][:12]}..., this one has "
            f"{base['model_sha256'][:12]}...; load that one, or train the adapter again"
        )
    try:
        grown = adapted(model, AdapterSettings(**manifest["adapter"]))
        weights = load_file(Path(folder) / WEIGHTS)
        found = grown.load_state_dict(weights, strict=False)
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputRefused(f"{folder}: not an adapter of this version: {error}") from error
    if found.unexpected_keys or set(weights) != set(adapter_weights(grown)):
        raise InputRefused(f"{folder}: its weights are not those of the model's layers; train the adapter again")
    return grown.eval()
