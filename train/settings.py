"""This module is what a RUN.toml may say; every key has a default that suits a laptop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from store.settings import Settings
from train.likelihood import Likelihood

LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255, and names are made longer with digests."""


class ModelSettings(Settings):
    """Sizes of the model."""

    width: int = Field(default=64, ge=8)
    """Size of an embedding."""
    layers: int = Field(default=2, ge=1)
    """Encoder blocks."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; divides the width."""
    bins: int = Field(default=16, ge=2)
    """Soft bins of a value's embedding."""
    bottlenecks: int = Field(default=4, ge=1)
    """Tokens through which a measurement of a cell speaks with its other measurements."""
    query_layers: int = Field(default=1, ge=0)
    """Blocks of the decoder of single features."""
    pathways: int = Field(default=0, ge=0, le=64)
    """Tokens that stand for the largest of ``knowledge.sets`` and read their visible members only."""
    attention: Literal["hybrid", "full"] = "full"
    """"full": every block reads the whole cell; "hybrid": within and between measurements in turn, joint at the end."""

    types: bool = True
    """Learn to tell cell types too, by prototypes on the Cell Ontology."""
    likelihood: dict[str, Likelihood] = Field(default_factory=dict)
    """Measurement to its likelihood, where it is not the usual one: ``ATAC = "bernoulli"``."""

    @model_validator(mode="after")
    def _divides(self) -> ModelSettings:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        return self


class KnowledgeSettings(Settings):
    """What is known of features before training; files are read once, what is used of them goes into the checkpoint."""

    sets: tuple[str, ...] = ()
    """GMT files of gene sets (GO, Reactome, Hallmark, ...); members by symbol or id."""
    smallest: int = Field(default=10, ge=2)
    """Members of a set at least."""
    largest: int = Field(default=200, ge=2)
    """Members of a set at most."""
    sequence: str = ""
    """An npz with ids and vectors from a model of sequences."""
    text: str = ""
    """An npz with ids and vectors from a model of texts."""
    aliases: str = ""
    """A table of two columns: a protein, metabolite or region, and the gene that it inherits from."""
    positions: str = ""
    """A BED file of where genes lie; peaks lie where their ids say, and inherit from the genes that they overlap."""
    genome: str = ""
    """A FASTA file: of chromosomes, or of records named after features."""
    window: int = Field(default=256, ge=16)
    """Bases around a feature that are read from ``genome``."""
    motifs: str = ""
    """Motifs (JASPAR or MEME) that are looked for in the windows: each is a set of the features that have it."""
    permute: bool = False
    """Deal memberships anew at random, degrees kept: the null arm that shows what knowledge is worth."""
    days: dict[str, str] = Field(default_factory=dict)
    """File to the day (YYYY-MM-DD) of its newest source, for audits."""

    @property
    def files(self) -> list[str]:
        """All files that are read."""
        single = (self.sequence, self.text, self.aliases, self.positions, self.genome, self.motifs)
        return [path for path in (*self.sets, *single) if path]

    @model_validator(mode="after")
    def _motifs_need_bases(self) -> KnowledgeSettings:
        if self.motifs and not self.genome:
            raise ValueError(f"motifs={self.motifs!r}: name the FASTA file to look in: genome")
        return self

    @model_validator(mode="after")
    def _some_size_fits(self) -> KnowledgeSettings:
        if self.smallest > self.largest:
            raise ValueError(f"smallest={self.smallest} is above largest={self.largest}: no set would be taken")
        return self

    @model_validator(mode="after")
    def _memberships_to_deal(self) -> KnowledgeSettings:
        if self.permute and not (self.sets or self.motifs):
            raise ValueError("permute=true deals no membership: name files in sets, or motifs, or leave it out")
        return self


class DataSettings(Settings):
    """What is streamed."""

    global_batch: int = Field(default=64, ge=1)
    """Cells of a step, over all workers."""
    split: str = "train"
    """The snapshot's split to train on."""
    test_split: str = "test"
    """The split whose loss is reported at the end, not that of training; empty reports none."""
    block: int = Field(default=2048, ge=1)
    """Consecutive rows that are read together."""
    window: int = Field(default=4, ge=1)
    """Blocks whose rows are mixed; three windows are held in memory, four from S3, more of a small part."""
    sets: bool = False
    """Stream whole sets of the snapshot (``set_size``), whose cells read each other; ``global_batch`` counts sets."""
    lanes: int = Field(default=1, ge=1)
    """Parts of a window that workers read apart: with as many as workers, or a multiple, each reads only its own."""
    memory_mb: int = Field(default=512, ge=16)
    """Most that decoded windows may take, in MiB, in each worker."""
    cache: str = ""
    """A local folder for decoded blocks, so that the second epoch needs no decoding; empty keeps none."""
    cache_gb: float = Field(default=50, gt=0)
    """What that folder may hold, in GiB."""
    tokens: int = Field(default=128, ge=8)
    """Tokens of a cell at most."""
    queries: int = Field(default=16, ge=2)
    """Features of a cell and measurement that the query decoder is asked for, half of them hidden non-zeros."""
    micro_batch: int = Field(default=0, ge=0)
    """Cells (or sets) that a worker takes at once, the gradients added up; 0 takes its whole share of a step. It saves
    memory and changes nothing but rounding."""
    matched_controls: float = Field(default=0.5, ge=0, le=1)
    """Share of perturbed cells that are predicted from a matched control of the same window."""
    earlier_cells: float = Field(default=0.25, ge=0, le=1)
    """Share of unperturbed cells that are predicted from an earlier one of the same dataset, where times are known."""

    @model_validator(mode="after")
    def _tested_elsewhere(self) -> DataSettings:
        if self.split == self.test_split:
            raise ValueError(
                f"test_split={self.test_split!r} is the split that is trained on; name another, or none (test_split='')"
            )
        return self


class OptimSettings(Settings):
    """How weights are changed."""

    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After it: a cosine to a tenth of the peak, or "wsd": the peak, and at the end a straight way to nothing."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps that the straight way of "wsd" takes."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""


class AdapterRun(Settings):
    """Adapt a trained model in place of training one: its weights stay, a low-rank adapter beside them learns."""

    base: str = ""
    """A checkpoint; empty trains a model of one's own. The snapshot's features begin with its (``--set like=...``)."""
    rank: int = Field(default=8, ge=1)
    """Rank of what is added to each layer."""
    alpha: int = Field(default=16, ge=1)
    """What is added is scaled by alpha / rank."""


class RunSettings(Settings):
    """One training run."""

    lake: str = "lake"
    """The lake that holds the snapshot."""
    snapshot: str
    """The snapshot's name."""
    output: str = "runs"
    """Folder of runs; this one's is ``<output>/<name>``."""
    name: str = "run"
    """The run's name, which its folder has; the same name goes on with the same run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides weights, order and masks."""
    steps: int = Field(default=300, ge=1)
    """Optimizer steps."""
    workers: int = Field(default=2, ge=1)
    """Processes that train; a GPU each where there are some."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where they train: "cuda" waits for nodes with GPUs (``patience_s``) and never trains on CPUs; "auto" takes what
    the cluster or machine has when the run starts."""
    workers_min: int = Field(default=0, ge=0)
    """Go on with so few workers when no more can be had, and grow again later; 0 waits for all of them."""
    max_failures: int = Field(default=3, ge=-1)
    """How often lost workers are replaced and the run goes on from its last state; -1 for ever."""
    collective_timeout_s: float = Field(default=600, gt=0)
    """Seconds that a worker waits for the others in an exchange; then the workers are taken for lost and replaced."""
    patience_s: float = Field(default=1800, gt=0)
    """Seconds that are waited in all for workers that cannot be started, for want of nodes; then the run ends with an
    error, and the same command goes on with it."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """"ddp": each worker holds the model; "fsdp": each holds a part of it, of its gradients and moments (FSDP2)."""
    precision: Literal["no", "bf16", "fp16", "fp8"] = "no"
    """Mixed precision; "fp16" needs a GPU, "fp8" is "bf16" whose blocks multiply in 8 bits (torchao), emulated where a
    device cannot."""
    compile: bool = False
    """Compile the blocks (``torch.compile``), once for batches of all sizes: slower to begin, then faster."""
    recompute: bool = False
    """Make activations again in the backward pass in place of keeping them: less memory, about a third more time."""
    deterministic: bool = False
    """Refuse operations that give other bits the next time."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between saves of the training state, which is written while training goes on."""
    keep_last: int = Field(default=2, ge=1)
    """Training states that are kept."""
    keep_best: bool = False
    """Keep the state with the lowest held-out loss too, and export it at the end as ``checkpoint-best``."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations on ``data.test_split``, which must have cells; 0 evaluates at the beginning and at the
    end."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where losses are shown besides metrics.jsonl: Accelerate's trackers by name (mlflow, wandb, trackio, ...)."""
    report: bool = True
    """Draw ``report.html`` at the end; ``python -m train report`` draws it at any time."""
    threads: int = Field(default=1, ge=1)
    """Torch threads of a worker on CPU, and the CPUs of a node that it books."""
    address: str | None = None
    """A running Ray cluster, HOST:PORT or ``auto``; left out, ``RAY_ADDRESS``, and without that Ray is started here and
    stopped at the end, as by ``local``."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    knowledge: KnowledgeSettings = KnowledgeSettings()
    adapter: AdapterRun = AdapterRun()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            raise ValueError(
                f"is the name of a folder in output: letters without '/' and line breaks, {LONGEST_NAME} bytes at most"
            )
        return name

    @model_validator(mode="after")
    def _pathways_are_known(self) -> RunSettings:
        if self.model.pathways and not (self.knowledge.sets or self.knowledge.motifs):
            raise ValueError(f"model.pathways={self.model.pathways}: name their GMT files in knowledge.sets")
        return self

    @model_validator(mode="after")
    def _what_is_asked_for_can_be(self) -> RunSettings:
        if "://" in self.output:
            raise ValueError(f"output={self.output!r}: runs are written to a folder; give one that all workers see")
        if self.workers_min > self.workers:
            raise ValueError(f"workers_min={self.workers_min} is more than workers={self.workers}")
        if self.device == "cpu" and self.precision == "fp16":
            raise ValueError("precision='fp16' needs a GPU, and device='cpu'; take 'bf16' or 'no'")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError("precision='fp16' does not go with parallel='fsdp'; take 'bf16'")
        if self.adapter.base and self.precision == "fp8":
            raise ValueError("adapter.base does not go with precision='fp8'; take 'bf16'")
        if self.adapter.base and self.parallel == "fsdp":
            raise ValueError("adapter.base goes with parallel='ddp'")
        if self.adapter.base and (self.knowledge.files or self.model != ModelSettings()):
            raise ValueError("adapter.base: the model is the checkpoint's; leave out [model] and [knowledge]")
        return self

    @model_validator(mode="after")
    def _evaluates(self) -> RunSettings:
        if self.keep_best and not (self.evaluate_every and self.data.test_split):
            raise ValueError("keep_best: say how often to evaluate (evaluate_every) and on what (data.test_split)")
        if self.evaluate_every and not self.data.test_split:
            raise ValueError(
                f"evaluate_every={self.evaluate_every}: say on which split (data.test_split), or leave it out"
            )
        if self.keep_best and self.evaluate_every > self.steps:
            raise ValueError(
                f"keep_best: evaluate_every={self.evaluate_every} never comes, for steps={self.steps}, and no state "
                "would be the best; evaluate more often, or leave keep_best out"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> RunSettings:
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.optim.warmup_steps} never ends: steps={self.steps}")
        return self
