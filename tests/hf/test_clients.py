"""What clients of LlamaForCausalLM do, done with MoHD: right, or refused with the reason. Small models, float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import small_plan
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from mohd_train.errors import UserError
from mohd_train.hf import MoHDConfig, MoHDForCausalLM
from mohd_train.hf.convert import from_hf_llama
from mohd_train.model.llama import RMSNorm
from mohd_train.model.mohd import GroupFusion, Router

KINDS = ("dense", "50", "75", "x2", "monarch")


def model_of(kind: str = "x2", **config: Any) -> MoHDForCausalLM:
    """Random weights with a spread that makes routing and logits vary; fusion away from the identity."""
    torch.manual_seed(3)
    plan = small_plan("x2", fusion="monarch") if kind == "monarch" else small_plan(kind)
    model = MoHDForCausalLM(MoHDConfig.from_plan(plan, **config))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GroupFusion):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> MoHDForCausalLM:
    return model_of(request.param)


def ids_of(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(5, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# Effective weights


def test_every_module_that_holds_a_parameter_is_called_once_it_has_a_hook(model: MoHDForCausalLM) -> None:
    """Adapters, offloading and quantization replace or hook modules: none of them may be read past."""
    ids = ids_of()
    want = model(ids).logits
    holders = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    assert {type(m) for m in holders} <= {nn.Linear, nn.Embedding, RMSNorm, Router, GroupFusion}
    called: set[nn.Module] = set()
    for module in holders:
        module.register_forward_hook(lambda module, args, output: called.add(module))
    close(model(ids).logits, want)
    assert called == set(holders)


class LoRA(nn.Module):
    """``W x + B A x``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 3, bias=False)
        self.b = nn.Linear(3, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "gate_proj", "down_proj"])
def test_an_adapter_acts_as_its_merged_weight(model: MoHDForCausalLM, name: str) -> None:
    ids, before = ids_of(), model(ids_of()).logits
    merged = copy.deepcopy(model)
    for block, other in zip(model.transformer.blocks, merged.transformer.blocks, strict=True):
        part = "attention" if name in ("q_proj", "o_proj") else "ffn"
        owner, target = getattr(block, part), getattr(getattr(other, part), name)
        adapter = LoRA(getattr(owner, name))
        setattr(owner, name, adapter)
        with torch.no_grad():
            target.weight += adapter.b.weight @ adapter.a.weight
    got = model(ids, labels=ids)
    close(got.logits, merged(ids).logits)
    assert (got.logits - before).abs().max() > 1e-3
    got.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".b." in n)


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_trains_merges_and_unmerges(use_dora: bool) -> None:
    peft = pytest.importorskip("peft")
    model, ids = model_of(), ids_of()
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        use_dora=use_dora,
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_" in n)
    wrapped.eval()
    want = wrapped(input_ids=ids).logits
    wrapped.merge_adapter()
    close(wrapped(input_ids=ids).logits, want)
    wrapped.unmerge_adapter()
    close(wrapped(input_ids=ids).logits, want)
    close(wrapped.merge_and_unload()(ids).logits, want)


def test_the_base_model_is_called_as_llamas() -> None:
    """What TRL computes its loss from: hidden states under transformers' names, whatever wraps the model."""
    model, ids = model_of(), ids_of()
    hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    close(model.get_output_embeddings()(hidden), model(ids).logits)
    assert model.base_model(ids, return_dict=False)[0].shape == hidden.shape


def test_offloaded_weights_are_fetched() -> None:
    from accelerate import cpu_offload

    model, ids = model_of(), ids_of()
    want = model(ids).logits
    close(cpu_offload(model, execution_device=torch.device("cpu"))(ids).logits, want)


def test_an_adapter_on_the_head_counts_in_the_loss() -> None:
    model, ids = model_of("dense"), ids_of()
    model.set_output_embeddings(LoRA(model.transformer.head))
    out = model(ids, labels=ids)
    want = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(out.loss, want)


# Training


def test_microbatches_add_up_to_the_step() -> None:
    """Cross-entropy exactly; the balance loss of each by its share of the tokens."""
    model, ids = model_of(), ids_of(4)
    labels = ids.clone()
    labels[0, 5:] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels)
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=count) for i in (0, 2)]
    shares = [(labels[i : i + 2, 1:] != -100).sum() / count for i in (0, 2)]
    balance = sum(part.balance_loss * share for part, share in zip(parts, shares, strict=True))
    close(sum(part.loss for part in parts) - balance, whole.loss - whole.balance_loss)


def test_trainer_accumulates_without_multiplying(tmp_path: Path) -> None:
    ids = ids_of(8)
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trained(batch: int, steps: int) -> float:
        args = TrainingArguments(
            str(tmp_path / f"{batch}"), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, prediction_loss_only=False,
        )  # fmt: skip
        trainer = Trainer(
            model_of("dense"),
            args,
            train_dataset=rows,  # type: ignore[arg-type]
            eval_dataset=rows,  # type: ignore[arg-type]
            compute_metrics=lambda found: {"shape": float(found.predictions.shape[-1])},
        )
        loss = trainer.train().training_loss
        assert trainer.evaluate()["eval_shape"] == 97  # predictions are the logits alone
        return loss

    assert trained(2, 4) == pytest.approx(trained(8, 1), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(model: MoHDForCausalLM) -> None:
    ids, found = ids_of(), []
    for enabled in (False, True):
        model.train()
        (model.gradient_checkpointing_enable if enabled else model.gradient_checkpointing_disable)()
        assert model.is_gradient_checkpointing is enabled
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        close(a, b)
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


# Arguments and outputs


def test_what_forward_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="'atention_mask'"):
        model_of()(ids_of(), atention_mask=torch.ones(2, 12))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model_of()()
    with pytest.raises(ValueError, match="output_attentions"):
        model_of()(ids_of(), output_attentions=True)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        AutoModelForCausalLM.from_config(MoHDConfig.from_plan(small_plan("x2")), attn_implementation="eager")


def test_outputs_are_laid_out_as_llamas() -> None:
    ids = ids_of()
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)).eval()  # fmt: skip
    ours = MoHDForCausalLM(MoHDConfig.from_plan(from_hf_llama(theirs).plan)).eval()
    ours.transformer.load_state_dict(from_hf_llama(theirs).state_dict())
    asked: dict[str, Any] = {"output_hidden_states": True, "labels": ids}
    a, b = ours(ids, **asked), theirs(ids, **asked)
    assert len(a.hidden_states) == len(b.hidden_states)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        close(x, y)
    kept = torch.tensor([0, 5])
    close(ours(ids, logits_to_keep=kept).logits, theirs(ids, logits_to_keep=kept).logits)
    close(ours(ids, logits_to_keep=2).logits, theirs(ids, logits_to_keep=2).logits)
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)
    close(
        ours(ids, position_ids=packed, use_cache=False).logits, theirs(ids, position_ids=packed, use_cache=False).logits
    )


def test_embeddings_in_place_of_tokens(model: MoHDForCausalLM) -> None:
    ids = ids_of()
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_masks_of_four_dims_equal_those_of_two(model: MoHDForCausalLM) -> None:
    ids, mask = ids_of(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & (mask[:, None, None, :] != 0)
    want = model(ids, attention_mask=mask, use_cache=False).logits
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    for four in (causal, added):
        got = model(ids, attention_mask=four, use_cache=False).logits
        close(got[mask != 0], want[mask != 0])


def test_packed_sequences_do_not_see_each_other(model: MoHDForCausalLM) -> None:
    one, other = ids_of(1, 5), ids_of(1, 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    got = model(torch.cat([one, other], 1), position_ids=positions, use_cache=False).logits
    close(got, torch.cat([model(one).logits, model(other).logits], 1))


def test_a_tuple_where_it_is_asked_for() -> None:
    ids = ids_of()
    for out in (model_of()(ids, return_dict=False), model_of(return_dict=False)(ids)):
        assert isinstance(out, tuple)
        close(out[0], model_of()(ids).logits)


# Caches


@pytest.mark.parametrize("how", ["plain", "labels", "use_cache=False", "train"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_is_given_is_used(model: MoHDForCausalLM, kind: str, how: str) -> None:
    ids = ids_of()
    want = model(ids).logits[:, 8:]
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :8], past_key_values=cache)
    model.train(how == "train")
    asked: dict[str, Any] = {"labels": {"labels": ids[:, 8:]}, "use_cache=False": {"use_cache": False}}.get(how, {})
    positions = torch.arange(8, 12)
    close(model(ids[:, 8:], past_key_values=cache, cache_position=positions, **asked).logits, want)


@pytest.mark.parametrize("kind", ["static", "dynamic", "offloaded"])
def test_generation_does_not_depend_on_the_cache(kind: str) -> None:
    model, ids = model_of(), ids_of()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if kind == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded cache needs a CUDA device")
    got = model.generate(ids, cache_implementation=kind, **asked)
    assert torch.equal(got, model.generate(ids, use_cache=False, **asked))


def test_a_cache_that_forgets_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, sliding_window=4)
    cache = DynamicCache(config=config)
    with pytest.raises(ValueError, match="forgets"):
        model_of()(ids_of(), past_key_values=cache)


# Other heads, other files


def test_the_model_without_its_head(tmp_path: Path) -> None:
    model, ids = model_of(), ids_of()
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    close(bare(ids).last_hidden_state, model(ids, output_hidden_states=True).hidden_states[-1])
    assert not [name for name, _ in bare.named_parameters() if "head" in name]


def test_sequence_classification(tmp_path: Path) -> None:
    model_of(pad_token_id=0).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    ids = ids_of()
    padded = ids.clone()
    padded[0, 9:] = 0
    out = model(padded, labels=torch.tensor([0, 2]))
    close(out.logits[:1], model(ids[:1, :9]).logits)
    close(out.loss, nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))
    model.save_pretrained(tmp_path / "tuned")
    close(AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()(padded).logits, out.logits)


def test_tied_embeddings_are_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = model_of(tie_word_embeddings=True), ids_of()
    assert model.transformer.head.weight is model.transformer.embedding.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.transformer.head.weight is loaded.transformer.embedding.weight
    close(loaded(ids).logits, model(ids).logits)


# Configurations


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"fusion": "nope"}, "fusion is 'nope'"),
        ({"mohd_ffn": {"sub_dims": 8, "top_k": 9, "shared": 3, "width": 16}}, "ffn.top_k is 9"),
        ({"mohd_ffn": {"sub_dims": 8, "top_k": 4, "shared": 5, "width": 16}}, "shared_sub_dims is 5"),
        ({"mohd_ffn": {"sub_dims": 8, "top_k": 4, "shared": 3, "width": 8}}, "ffn.width is 8"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(changes: dict[str, Any], said: str) -> None:
    config = MoHDConfig.from_plan(small_plan("x2")).to_dict()
    with pytest.raises(ValueError, match=said):
        MoHDConfig(**{**config, **changes})


def test_a_sliding_window_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    with pytest.raises(UserError, match="sliding_window=16"):
        from_hf_llama(MistralForCausalLM(MistralConfig(**sizes, sliding_window=16)))  # type: ignore[arg-type]
    from_hf_llama(MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)))  # type: ignore[arg-type]
