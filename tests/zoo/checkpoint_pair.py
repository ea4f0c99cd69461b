"""Two tiny checkpoints of a family, A and B, as a trainer has them in memory and as they are published."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from families import Family
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """One checkpoint.

    Attributes:
        folder: on disk, in published form.
        published: its tensors by the names that the files have.
        state_dict: the same weights by the names of transformers 5's `state_dict`.
    """

    folder: Path
    published: Tensors
    state_dict: Tensors

    def written(self, tensors: Tensors, folder: Path) -> Path:
        """Write a checkpoint of the same model with other tensors; its folder."""
        shutil.copy(self.folder / "config.json", folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


@dataclass(frozen=True, repr=False)
class Pair:
    """Two checkpoints of one model of which no tensor is the same."""

    family: Family
    a: Checkpoint
    b: Checkpoint

    def __getitem__(self, which: str) -> Checkpoint:
        return {"A": self.a, "B": self.b}[which]


def make_pair(family: Family, folder: Path) -> Pair:
    """Write checkpoints A and B of a family into a folder, in bf16."""
    return Pair(family, _make(family, folder / "A", seed=0), _make(family, folder / "B", seed=7))


def _make(family: Family, folder: Path, seed: int) -> Checkpoint:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.model_type](**family.settings)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed + 100)
    weights = model.state_dict(keep_vars=True)
    with torch.no_grad():
        # Also what a fresh model has constant, such as biases and norms: equal in A and B, nobody would miss it.
        for tensor in {id(tensor): tensor for tensor in weights.values()}.values():
            tensor.add_((torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype))
    model.save_pretrained(folder)
    published: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        published.update(load_file(file))
    return Checkpoint(folder, published, {name: tensor.detach().clone() for name, tensor in weights.items()})
