"""This module holds the settings of a server: where it listens, how much it accepts, how it batches."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from store.settings import Settings


class Limits(Settings):
    """What one request may hold; checked before anything is allocated for it."""

    body_bytes: int = Field(default=32 * 2**20, gt=0)
    """Largest request body; a larger one is answered 413 before it is read."""
    inside_bytes: int = Field(default=512 * 2**20, gt=0)
    """Most bytes of all bodies that one ingress holds; a body that does not tell its size counts as the largest."""
    unpacked_bytes: int = Field(default=256 * 2**20, gt=0)
    """Most bytes that an npz body may have once it is unpacked."""
    cells: int = Field(default=10_000, gt=0)
    """Most cells in a request."""
    nonzeros: int = Field(default=4_000_000, gt=0)
    """Most stored counts in a request, over all measurements."""
    features: int = Field(default=200_000, gt=0)
    """Most features that one measurement of a request may name."""
    perturbations: int = Field(default=64, gt=0)
    """Most perturbations in a request."""
    values: int = Field(default=4_000_000, gt=0)
    """Most predicted values in a reply: cells times features, or, where effects come with vectors, perturbations times
    features times 3 (5 of a head)."""
    min_coverage: float = Field(default=0.05, ge=0, le=1)
    """Least share of a measurement's counts that must belong to features of the model; one with less is left out, and
    refused where there is no other."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest time from acceptance to answer."""
    reader_bytes: int = Field(default=2**30, ge=2**28)
    """Memory of each of the processes that read Arrow streams and h5ad files."""
    reader_s: float = Field(default=10.0, gt=0)
    """Longest time that reading one of these may take."""


class Batching(Settings):
    """How requests share the model."""

    budget_tokens: int = Field(default=32_768, gt=0)
    """Most tokens, padding included, in one forward pass; bounds the memory that a pass needs."""
    piece_tokens: int = Field(default=8_192, gt=0)
    """Size of the pieces into which a large request is cut, so that small requests find room beside it."""
    queue_tokens: int = Field(default=2_097_152, gt=0)
    """Most tokens that wait for the model; more are answered 429."""
    queue_s: float = Field(default=30.0, gt=0)
    """Longest from a request's coming in to the model's answer, as its speed of late goes; else it is answered 429."""


class Scaling(Settings):
    """How the number of copies follows the work; only where ``most`` is more than the ``replicas`` to begin with."""

    most: int = Field(default=0, ge=0)
    """Most copies of the model; 0 keeps their number as it is."""
    requests: float = Field(default=4, gt=0)
    """Requests inside, for each copy, at which there are as many copies as there should be."""
    up_s: float = Field(default=10, ge=0)
    """Seconds that there must be too much work before a copy is added."""
    down_s: float = Field(default=300, ge=0)
    """Seconds that there must be too little before one is taken away."""


class JobSettings(Settings):
    """What bulk jobs may take from the machines that serve; their workers have low priority besides."""

    workers: int = Field(default=1, gt=0)
    """Processes that embed, for each job."""
    cpus: float = Field(default=1, gt=0)
    """CPUs of each, which Ray must have free; threads too."""


DEFAULT_PORTS = {"http": "80", "https": "443"}


def _origin(said: str) -> str:
    """Write an origin as browsers send it: in small letters, without the port that is its scheme's own.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"(https?)://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?/?", said.strip().lower())
    if said.strip() == "*":
        return "*"
    if found is None:
        raise ValueError(f'{said!r} is no origin; say a scheme, a host and no path: https://app.example.org, or "*"')
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + (f":{int(port)}" if port and port != DEFAULT_PORTS[scheme] else "")


LOOPBACK = ("127.0.0.1", "::1", "localhost")
HostName = Annotated[str, AfterValidator(str.lower), Field(pattern=r"^(\*|[A-Za-z0-9_.-]+)$")]
Origin = Annotated[str, AfterValidator(_origin)]
LakeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class Explore(Settings):
    """What the page at ``/`` may take: cells that are looked at together stay in the ingress for a while."""

    cells: int = Field(default=100_000, gt=0)
    """Most cells that are looked at together; of a larger snapshot so many are drawn."""
    nonzeros: int = Field(default=60_000_000, gt=0)
    """Most stored counts of them."""
    sessions: int = Field(default=16, gt=0)
    """Most sets of cells that are kept; the one that was longest not asked for goes first."""
    memory_mb: int = Field(default=2_048, gt=0)
    """Most memory of all that are kept, and of a process that reads a file."""
    idle_s: float = Field(default=1_800, gt=0)
    """A set that nobody asked for so long is let go."""
    preparing: int = Field(default=2, gt=0)
    """Sets that are read and embedded at a time; who wants another meanwhile is answered 429."""
    prepare_s: float = Field(default=1_800, gt=0)
    """Longest time to read, embed and place a set."""
    read_s: float = Field(default=120, gt=0)
    """Longest time to read a file."""
    fitted_cells: int = Field(default=20_000, ge=15)
    """UMAP is fitted to so many cells at most, drawn at random; the others are placed among them."""
    perturbed_cells: int = Field(default=500, gt=0)
    """The effect on a larger selection is averaged over so many of its cells, drawn at random."""


class ServeSettings(Settings):
    """Everything that ``python -m serve run`` can be told."""

    checkpoint: str
    """Directory of the checkpoint (safetensors, vocabulary, manifest)."""
    cells: dict[str, str] = Field(default_factory=dict)
    """Name to h5ad file, of the cells that the page offers."""
    snapshots: dict[str, str] = Field(default_factory=dict)
    """Name of a snapshot to the lake that holds it, of those that the page offers."""
    watch_s: float = Field(default=0, ge=0)
    """Seconds between looks for another checkpoint written at the same place, which answers once its files stand
    still from one look to the next; 0 never looks."""
    host: str = "127.0.0.1"
    """Address to listen on. Anyone who reaches it can ask the model, unless there is a file of tokens."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """TCP port to listen on; 0 takes a free one."""
    replicas: int = Field(default=1, gt=0)
    """Copies of the model that answer side by side."""
    threads: int = Field(default=1, gt=0)
    """CPU threads of each copy."""
    device: str = Field(default="cpu", pattern="^(cpu|cuda)$")
    """Torch device of each copy, ``cpu`` or ``cuda``; on CUDA each copy gets a GPU of the cluster for itself."""
    address: str = ""
    """A running Ray cluster, HOST:PORT or ``auto``; empty, ``RAY_ADDRESS``, and without that Ray is started here and
    stopped at the end, as by ``local``."""
    tokens_file: str = ""
    """TOML file of who may ask (``serve.access``), on every machine with an ingress; empty lets everybody in."""
    origins: Annotated[
        tuple[Origin, ...], BeforeValidator(lambda said: (said,) if isinstance(said, str) else said)
    ] = ()
    """Origins (``https://app.example.org``) of web pages beside ours whose scripts may ask, with a token where there is
    a file of them (CORS); ``*`` is every page."""
    hosts: tuple[HostName, ...] = ()
    """Names, beside ``localhost``, under which a server that listens on loopback and knows no tokens may be asked, such
    as by a proxy on this machine that passes on the name it was asked for; ``*`` is every name."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name to folder of adapters of the checkpoint (``<run>/adapter``); requests choose one by name."""
    adapters_loaded: int = Field(default=8, gt=0)
    """Adapters that a copy of the model keeps in memory."""
    heads: dict[str, str] = Field(default_factory=dict)
    """Name to folder of transition heads (``python -m train head``) of the checkpoint's features; questions about
    perturbations choose one by name."""
    scaling: Scaling = Scaling()
    lakes: dict[LakeName, str] = Field(default_factory=dict)
    """Lakes that can be asked about, name to place; requests say names only. Every ingress and worker sees them."""
    jobs: JobSettings = JobSettings()
    limits: Limits = Limits()
    explore: Explore = Explore()
    batching: Batching = Batching()

    def names(self) -> tuple[str, ...] | None:
        """Return the names, beside this machine's own, that requests may be for; none where any name will do."""
        return self.hosts if self.host in LOOPBACK and not self.tokens_file else None


def gpus_of(device: str) -> int:
    """Return the GPUs that a process has for itself whose model is on a torch device."""
    return 1 if device.startswith("cuda") else 0
