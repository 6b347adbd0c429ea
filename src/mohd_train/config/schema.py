"""The typed schema of a run: every key that a YAML file may hold, with its only default.

Key names are Composer's and llm-foundry's where they have one, and the paper's (arXiv:2412.05644) for MoHD. OmegaConf checks the
types; rules across fields are in :mod:`mohd_train.config.plan` and :mod:`mohd_train.config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from omegaconf import MISSING

# OmegaConf reads these annotations at run time and knows Optional and Union, not `X | None`, on every Python we support.
# ruff: noqa: UP007, UP045


@dataclass
class ModelConfig:
    """The base (LLaMA) model; `mohd` changes its hidden size and what of it is active. Table 1 of the paper."""

    name: str = MISSING
    hidden_size: int = MISSING  # d0
    intermediate_size: int = MISSING  # F, not changed by expansion
    num_hidden_layers: int = MISSING  # L
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING  # attention width A = heads x head_dim, not changed by expansion
    vocab_size: int = 32000  # V
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    # normal: N(0, initializer_range^2) | torch: torch's defaults, which the paper's codebase leaves in place
    init: str = "normal"
    initializer_range: float = 0.02


@dataclass
class SubDimensionConfig:
    """Sub-dimensions of one component (Table 3). `null` in place of it means a dense component."""

    sub_dims: int = MISSING  # N: how many the hidden size is split into
    top_k: int = MISSING  # K: active ones per token, shared ones included
    shared_sub_dims: int = MISSING  # S: the first S are active for every token


@dataclass
class ExpertsConfig:
    """A mixture-of-experts feed-forward layer: the baseline of configs/moe (docs/mohd.md)."""

    num_experts: int = MISSING  # N, each with intermediate_size / top_k dims
    top_k: int = MISSING  # K: experts a token uses, shared ones included
    shared_experts: int = 0  # S: the first S are active for every token


@dataclass
class MoHDSettings:
    """MoHD on top of the base model. Where the paper is silent, each key is one reading of it (docs/mohd.md)."""

    name: str = "dense"
    expansion: int = 1  # hidden size d = expansion x d0
    attention: Optional[SubDimensionConfig] = None
    ffn: Optional[SubDimensionConfig] = None
    experts: Optional[ExpertsConfig] = None  # in place of ffn: a mixture of experts over the intermediate size
    routing: str = "learned"  # who chooses the specialized sub-dimensions: learned | random (a control)
    router_input: str = "normalized"  # what the router reads: normalized | residual (the stream before the norm)
    # std of the router's logits at the start, the same at any width; null: the router is drawn like any other matrix
    router_init_std: Optional[float] = None
    scaling: str = "sum_to_active"  # activation scaling: sum_to_active | sum_to_all | subdims | gate_mass | none
    fusion: str = "grouped"  # group fusion (eq. 9): grouped | monarch | none
    gate_input: bool = False  # multiply the component's active inputs by the routing weights too
    balance_loss_weight: float = 0.01  # beta (eq. 13)
    balance_reduction: str = "sum"  # over layers and components: sum | component_mean
    balance_count: str = "selected"  # f counts what a token selected, or only the highest score: selected | highest
    # P averages the softmax over the specialized ones, or over all: specialized | all
    balance_scores: str = "specialized"


@dataclass
class DataConfig:
    """Prepared data (`mohd prepare`) and the mix it is streamed in."""

    local: str = MISSING  # folder with manifest.json, or the cache when `remote` is set
    remote: Optional[str] = None
    domains: dict[str, float] = field(default_factory=dict)  # proportions; they are normalized to sum to 1
    # May be absent from the data: the other proportions are then renormalized, which is logged
    optional_domains: list[str] = field(default_factory=list)
    shuffle: bool = True
    shuffle_seed: Optional[int] = None  # default: the run's seed
    shuffle_block_size: Optional[int] = None
    num_canonical_nodes: Optional[int] = None
    predownload: Optional[int] = None
    num_workers: int = 2
    download_retry: int = 2
    download_timeout: float = 120.0
    worker_timeout: float = 600.0  # seconds to wait for a batch from a worker; 0: forever
    verify: bool = True  # check every shard's size and hash against the manifest before the first step


@dataclass
class OptimizerConfig:
    """The optimizer. Composer's decoupled AdamW: weight decay is not multiplied by the learning rate."""

    name: str = "decoupled_adamw"  # decoupled_adamw | adamw
    lr: float = 3.0e-4
    router_lr: Optional[float] = None  # the router's own learning rate; default: lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 0.0


@dataclass
class SchedulerConfig:
    """Composer's scheduler. It scales the router's learning rate as it does the model's."""

    name: str = "cosine_with_warmup"  # cosine_with_warmup | linear_decay_with_warmup | constant_with_warmup
    t_warmup: str = "0ba"
    alpha_f: float = 0.1  # final learning rate as a share of the peak


@dataclass
class Config:
    """A complete run: what `scripts/train.py` reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mohd: MoHDSettings = field(default_factory=MoHDSettings)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    run_name: Optional[str] = None  # default: {model.name}-{mohd.name}
    run_folder: str = "runs/{run_name}"  # run.json, logs, figures
    seed: int = 17
    device: str = "auto"  # auto | cpu | gpu
    precision: str = "amp_bf16"  # amp_bf16 | amp_fp16 | fp32
    kernels: str = "auto"  # auto | reference | grouped | triton
    compile: bool = False
    deterministic: bool = True
    max_seq_len: int = 4096

    max_duration: str = MISSING  # "50000ba", "10ep", "10000000tok"
    global_train_batch_size: int = MISSING  # samples
    device_train_microbatch_size: Union[int, str] = "auto"
    device_eval_batch_size: int = 8
    eval_interval: str = "1000ba"
    eval_first: bool = False
    eval_subset_num_batches: int = -1
    gradient_clipping: Optional[float] = 1.0  # norm; null: none

    fsdp_config: Optional[dict[str, Any]] = None  # Composer's parallelism_config.fsdp; null: DDP
    dist_timeout: float = 600.0

    save_folder: str = "{run_folder}/checkpoints"
    save_interval: str = "1000ba"
    save_num_checkpoints_to_keep: int = -1  # the last K; -1: all
    save_keep_every: Optional[str] = None  # such as "10000ba": besides the last K, the checkpoints at multiples of it
    save_overwrite: bool = False
    autoresume: bool = False
    load_path: Optional[str] = None
    load_weights_only: bool = False

    # Faults while running (docs/faults.md)
    nonfinite_loss: str = "stop"  # a NaN or infinite loss or gradient: stop | skip (no update from that batch)
    loss_spike_factor: Optional[float] = 1.5  # warns of a loss above this multiple of the recent median; null: off
    router_collapse: str = "warn"  # warn | stop | ignore
    router_collapse_share: float = 0.98  # one specialized sub-dimension is active for this share of the tokens...
    router_collapse_time: str = "1000ba"  # ...for this long
    start_timeout: float = 1800.0  # seconds to the first batch; then every rank reports its stack and exits

    loggers: dict[str, Any] = field(default_factory=dict)  # name -> keyword arguments of Composer's logger
    callbacks: dict[str, Any] = field(default_factory=dict)  # name -> keyword arguments of Composer's callback
    progress_bar: bool = True
    console_log_interval: Optional[str] = None  # such as "100ba": plain lines, with or without the bar
    routing_log_interval: str = "10ba"  # routing statistics per layer and component
    python_log_level: str = "info"
