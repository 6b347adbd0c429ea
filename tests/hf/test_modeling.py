from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.plans import SETTINGS, small_plan
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError
from mohd_train.hf import MoHDConfig, MoHDForCausalLM
from mohd_train.hf.convert import from_hf_llama, to_hf_llama
from mohd_train.model.llama import Transformer


def llama(**changes: object) -> LlamaForCausalLM:
    sizes: dict = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 6}, {"head_dim": 12}, {"rope_theta": 500.0}, {"rms_norm_eps": 1e-3}]
)
@pytest.mark.parametrize("length", [1, 7, 64])
def test_llama_equals_hugging_face(changes: dict, length: int) -> None:
    theirs = llama(**changes)
    ours = from_hf_llama(theirs)
    ids = torch.randint(97, (3, length))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        loss = theirs(ids, labels=ids).loss
        if length > 1:
            torch.testing.assert_close(ours(ids, labels_BT=ids).cross_entropy, loss, rtol=1e-5, atol=1e-5)


def test_llama_equals_hugging_face_with_padding_and_cache() -> None:
    theirs = llama()
    config = MoHDConfig.from_plan(from_hf_llama(theirs).plan)
    ours = MoHDForCausalLM(config).eval()
    ours.transformer.load_state_dict(from_hf_llama(theirs).state_dict())
    ids = torch.randint(97, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        a, b = (m(ids, attention_mask=mask, position_ids=positions, use_cache=True) for m in (ours, theirs))
        torch.testing.assert_close(a.logits[mask.bool()], b.logits[mask.bool()], rtol=1e-5, atol=1e-5)
        step = torch.randint(97, (2, 1))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        after = positions[:, -1:] + 1
        c, d = (
            m(step, attention_mask=mask, position_ids=after, past_key_values=past.past_key_values)
            for m, past in ((ours, a), (theirs, b))
        )
        torch.testing.assert_close(c.logits, d.logits, rtol=1e-5, atol=1e-5)


def test_there_and_back_is_bit_equal() -> None:
    theirs = llama()
    back = to_hf_llama(from_hf_llama(theirs))
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_and_dtype_are_kept() -> None:
    theirs = llama(tie_word_embeddings=True).to(torch.bfloat16)
    ours = from_hf_llama(theirs)
    assert ours.head.weight.dtype == torch.bfloat16
    assert torch.equal(ours.head.weight, ours.embedding.weight)


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"hidden_act": "gelu"}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}],
)
def test_a_llama_of_another_kind_is_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        from_hf_llama(llama(**changes))


def test_mohd_does_not_convert_to_llama() -> None:
    with pytest.raises(UserError, match="MoHD components"):
        to_hf_llama(Transformer(small_plan("x2")))


def mohd(setting: str) -> MoHDForCausalLM:
    torch.manual_seed(2)
    model = MoHDForCausalLM(MoHDConfig.from_plan(small_plan(setting), bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    return model


@pytest.mark.parametrize("setting", ["dense", *SETTINGS])
def test_config_round_trip(setting: str, tmp_path: Path) -> None:
    plan = small_plan(setting, scaling="subdims", fusion="monarch")
    MoHDConfig.from_plan(plan, bos_token_id=1).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MoHDConfig)
    assert again.to_plan() == plan
    assert (again.bos_token_id, again.tie_word_embeddings) == (1, False)


def test_config_round_trip_of_every_reading(tmp_path: Path) -> None:
    """Each reading away from its default: a field that the configuration forgot would come back as the default."""
    changed = {
        "routing": "random",
        "router_input": "residual",
        "router_init_std": 0.1,
        "scaling": "gate_mass",
        "fusion": "monarch",
        "gate_input": True,
        "balance_loss_weight": 0.5,
        "balance_reduction": "component_mean",
        "balance_count": "highest",
        "balance_scores": "all",
    }
    plan = small_plan("75", model={"init": "torch"}, **changed)
    unchanged = small_plan("75")
    readings = set(changed) | {"init"}
    assert all(getattr(plan, name) != getattr(unchanged, name) for name in readings)
    parts = {"attention", "ffn", "experts"}
    assert {f.name for f in dataclasses.fields(ModelPlan) if f.default is not dataclasses.MISSING} == readings | parts
    MoHDConfig.from_plan(plan).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_plan() == plan


def test_a_config_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """``sum_preserving`` is called ``sum_to_active`` now; readings that did not exist stand at what was done then."""
    MoHDConfig.from_plan(small_plan("x2")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for name in ("init", "router_input", "router_init_std", "balance_count", "balance_scores"):
        values.pop(name, None)
    values["scaling"] = "sum_preserving"
    file.write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(tmp_path).to_plan() == small_plan("x2")


@pytest.mark.parametrize("setting", ["dense", "x2", "75"])
def test_save_and_load_through_auto_classes(setting: str, tmp_path: Path) -> None:
    model = mohd(setting)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, MoHDForCausalLM)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():  # a matrix product's last bit may depend on where its weights lie in memory
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert half(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("setting", ["dense", "x2", "75", "50"])
def test_generate_with_cache_equals_without_and_padding_changes_nothing(setting: str) -> None:
    model = mohd(setting).double()
    prompts = [torch.randint(3, 97, (n,)) for n in (4, 9)]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = [model.generate(p[None], use_cache=True, **options)[0, len(p) :] for p in prompts]
    for p, expected in zip(prompts, alone, strict=True):
        assert torch.equal(model.generate(p[None], use_cache=False, **options)[0, len(p) :], expected)
    batch = torch.zeros(2, 9, dtype=torch.long)
    batch[0, 5:], batch[1] = prompts[0], prompts[1]
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    assert torch.equal(together, torch.stack(alone))


def test_the_layout_for_decoding_changes_nothing_but_memory(tmp_path: Path) -> None:
    """Generated from, a model gives the same logits, saves the same file, and trains on."""
    model, same = mohd("x2").double(), mohd("x2").double()
    ids = torch.randint(3, 97, (2, 9))
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    laid_out = [not parameter.is_contiguous() for parameter in model.parameters()]
    assert sum(laid_out) == 5 * len(model.transformer.blocks)  # q, k, v, gate, up
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in same.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name].to(value.dtype), value), name
    model(ids, labels=ids).loss.backward()
    same(ids, labels=ids).loss.backward()
    for left, right in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_loss_is_cross_entropy_plus_balance_loss() -> None:
    model = mohd("x2")
    ids = torch.randint(97, (2, 9))
    out = model(ids, labels=ids)
    logits = out.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        out.loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()) + out.balance_loss
    )
    assert out.balance_loss > 0
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, model(ids).logits[:, -1:])


def test_new_models_are_drawn_from_the_initializer_range() -> None:
    torch.manual_seed(4)
    model = MoHDForCausalLM(MoHDConfig.from_plan(small_plan("x2")))
    assert model.transformer.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.transformer.norm.weight, torch.ones(128))


def test_a_checkpoint_that_lacks_weights_is_seen_and_filled(tmp_path: Path) -> None:
    mohd("x2").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.blocks.0.ffn.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == ["transformer.blocks.0.ffn.up_proj.weight"]
    ffn = again.transformer.blocks[0].ffn
    assert ffn.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(ffn.down_proj.weight, state["transformer.blocks.0.ffn.down_proj.weight"])
