"""Memory of one GPU in training: what is there the whole time, and what each stage of a step adds.

Parameters, gradients and optimizer state are float32 (``mixed_precision: FULL`` under FSDP, where autocast makes the
half-precision copies). The temporaries of a stage are counted from the code that makes them: `kernels/loss.py`, the blocks'
backward pass, the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from mohd_train.config.plan import ModelPlan
from mohd_train.estimate.activations import COMPUTE_BYTES, SavedBytes
from mohd_train.estimate.hardware import CONTEXT, FRAGMENTATION
from mohd_train.kernels.loss import CHUNK_LOGITS
from mohd_train.model.count import Counts

WIDE = 4  # bytes of float32
OPTIMIZER_STATES = 2  # of Adam: both moments
SHARDED_PARAMETERS = ("FULL_SHARD", "HYBRID_SHARD")
HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")


@dataclass(frozen=True)
class Sharding:
    """How many GPUs share one copy of the training state.

    Attributes:
        shards: GPUs that a copy is spread over; 1 for DDP, and on one GPU.
        strategy: FSDP's sharding strategy; None for DDP.
        replicas: whether there are other processes (DDP then keeps gradient buckets besides the gradients).
        checkpointing: whether blocks are recomputed in the backward pass.
    """

    shards: int
    strategy: str | None
    replicas: bool
    checkpointing: bool


def sharding(fsdp_config: dict[str, object] | None, gpus: int, gpus_per_node: int = 8) -> Sharding:
    """The sharding that ``fsdp_config`` asks for. Activation checkpointing is part of Composer's FSDP, on one GPU too."""
    if fsdp_config is None:
        return Sharding(1, None, gpus > 1, False)
    strategy = str(fsdp_config.get("sharding_strategy", "FULL_SHARD"))
    checkpointing = bool(fsdp_config.get("activation_checkpointing", False))
    shards = min(gpus, gpus_per_node) if strategy in HYBRID else 1 if strategy == "NO_SHARD" else gpus
    return Sharding(shards, strategy, gpus > 1, checkpointing)


@dataclass(frozen=True)
class MemoryModel:
    """Memory of one GPU as a function of the microbatch.

    Attributes:
        plan, counts: the model.
        saved: what the forward pass saves (:func:`mohd_train.estimate.activations.trace`).
        precision, optimizer: as in the config.
        device_batch: samples of one GPU in a step. With more than one microbatch, gradients of the earlier ones are there already.
        eval_batch: samples of one GPU in a validation batch.
    """

    plan: ModelPlan
    counts: Counts
    saved: SavedBytes
    sharding: Sharding
    precision: str
    optimizer: str
    device_batch: int
    eval_batch: int

    @property
    def compute(self) -> int:
        """Bytes of the compute dtype."""
        return COMPUTE_BYTES[self.precision]

    @property
    def parameters(self) -> int:
        """Bytes of all parameters."""
        return WIDE * self.counts.parameters

    @property
    def root(self) -> int:
        """Bytes of FSDP's outermost unit: embedding, head and last norm."""
        return WIDE * (self.counts.embedding + self.counts.head + self.plan.hidden_size)

    @property
    def block(self) -> int:
        """Bytes of one block's parameters, an FSDP unit each."""
        return (self.parameters - self.root) // self.plan.num_hidden_layers

    def standing(self) -> dict[str, int]:
        """What is there the whole time, without gradients."""
        shards = self.sharding.shards
        return {"weights": self.parameters // shards, "optimizer": OPTIMIZER_STATES * self.parameters // shards}

    def gradients(self) -> int:
        """This GPU's gradients, and DDP's buckets."""
        copies = 2 if self.sharding.replicas and self.sharding.shards == 1 else 1
        return copies * self.parameters // self.sharding.shards

    def gathered(self, *, backward: bool) -> int:
        """What FSDP gathers: the whole parameters of the units in use, and in the backward pass their whole gradients.

        The outermost unit stays gathered from its first use to the end; one block computes while the next one is gathered.
        """
        if self.sharding.shards == 1:
            return 0
        whole = self.root + 2 * self.block if self.sharding.strategy in SHARDED_PARAMETERS else self.parameters
        return whole + (self.root + self.block if backward else 0)

    def _loss_forward(self, tokens: int) -> int:
        """The hidden states, the head in the compute dtype, and of one chunk the log-softmax and two gradients in float32."""
        head, hidden = self.counts.head, tokens * self.plan.hidden_size
        chunk = min(tokens, max(1, CHUNK_LOGITS // self.plan.vocab_size)) * self.plan.vocab_size
        if self.compute == WIDE:
            return WIDE * hidden + 3 * WIDE * chunk + WIDE * head
        casts = self.compute * (head + hidden)
        return WIDE * hidden + casts + max((3 * WIDE + self.compute) * chunk, (WIDE + self.compute) * chunk + 2 * head)

    def _loss_backward(self, tokens: int) -> int:
        """The hidden states, the scaled gradients, and the head's gradient cast back to float32."""
        cast = 0 if self.compute == WIDE else self.compute
        hidden = tokens * self.plan.hidden_size
        return (WIDE + self.compute) * hidden + (WIDE + cast) * self.counts.head

    def working(self, tokens: int) -> int:
        """Temporaries of one block's backward pass: gradients of the residual stream, of two FFN tensors and of one weight."""
        d, f = self.plan.hidden_size, self.plan.intermediate_size
        return tokens * (WIDE * d + 2 * self.compute * f) + WIDE * d * max(f, self.plan.query_width)

    def _step(self) -> int:
        """The optimizer's temporaries. The decoupled one updates parameter by parameter, torch's all of them at once."""
        if self.optimizer == "adamw":
            return self.parameters // self.sharding.shards
        largest = max(self.counts.embedding, self.plan.hidden_size * self.plan.ffn_width)
        return 2 * WIDE * largest // self.sharding.shards

    def _validation(self) -> dict[str, int]:
        """All logits of a batch, in float32 too, and their log-softmax (the metrics run under autocast)."""
        tokens = self.eval_batch * self.plan.max_seq_len
        copies = 2 * WIDE if self.compute == WIDE else self.compute + 2 * WIDE
        return {"logits and loss": copies * tokens * self.plan.vocab_size, "temporaries": self.working(tokens)}

    def stages(self, samples: int) -> dict[str, dict[str, int]]:
        """Stage -> part -> bytes, with microbatches of ``samples``.

        ``loss`` is the end of the forward pass, ``backward`` the backward pass of the last block, when the least has been freed.
        """
        tokens, layers, saved = samples * self.plan.max_seq_len, self.plan.num_hidden_layers, self.saved
        standing, gradients = self.standing(), self.gradients()
        before = gradients if samples < self.device_batch else 0  # of earlier microbatches
        inputs, internal = layers * samples * saved.block_input, saved.block_per_sample - saved.block_input
        if self.sharding.checkpointing:
            activations, copies, recomputed, copied = inputs, 0, samples * internal, saved.block_fixed
        else:
            activations, copies = layers * samples * saved.block_per_sample, layers * saved.block_fixed
            recomputed = copied = 0
        loss = max(self._loss_forward(tokens), self._loss_backward(tokens)) + saved.ends(samples)
        return {
            "loss": {
                **standing,
                "gradients": before,
                "gathered by FSDP": self.gathered(backward=False),
                "activations": activations,
                "weights in half precision": copies,
                "logits and loss": loss,
            },
            "backward": {
                **standing,
                "gradients": before,
                "gathered by FSDP": self.gathered(backward=True),
                "activations": activations + recomputed,
                "weights in half precision": copies + copied,
                "temporaries": self.working(tokens),
            },
            "optimizer": {**standing, "gradients": gradients, "temporaries": self._step()},
            "validation": {
                **standing,
                "gradients": gradients,
                "gathered by FSDP": self.gathered(backward=False),
                **self._validation(),
            },
        }

    def peak(self, samples: int) -> tuple[str, dict[str, int]]:
        """The stage that takes the most, and its parts."""
        return max(self.stages(samples).items(), key=lambda stage: sum(stage[1].values()))

    def needed(self, samples: int) -> int:
        """Bytes that a GPU needs: the peak, fragmentation, and what lies outside torch's allocator."""
        return int(sum(self.peak(samples)[1].values()) * (1 + FRAGMENTATION)) + CONTEXT

    def largest(self, memory: int) -> int:
        """The largest microbatch that fits ``memory`` bytes, up to the device's batch; 0 if not one sample fits."""
        low, high = 0, self.device_batch
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needed(middle) <= memory else (low, middle - 1)
        return low
