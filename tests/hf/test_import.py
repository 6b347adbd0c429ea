from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf.test_modeling import llama
from support.native import save_tokenizer
from train.test_run import assert_same_run, crash
from train.train_support import ROOT, VOCAB, write_config
from transformers import LlamaForCausalLM

from mohd_train import checkpoint
from mohd_train.config.load import load_config, load_model_plan, load_mohd
from mohd_train.config.schema import Config, ExpertsConfig, MoHDSettings, SubDimensionConfig
from mohd_train.errors import UserError
from mohd_train.hf.convert import from_hf_llama, load_native
from mohd_train.hf.import_llama import as_mohd, import_llama, importance


def settings(n: int, k: int, s: int, **others: object) -> MoHDSettings:
    part = SubDimensionConfig(n, k, s)
    return MoHDSettings(name="small", attention=part, ffn=part, **others)  # type: ignore[arg-type]


def ids_of() -> torch.Tensor:
    return torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(2))


def test_another_order_of_the_dims_changes_nothing_with_all_of_them_active() -> None:
    """Weights of a router that is even are 1: the function is the dense model's to within the router's start."""
    dense = from_hf_llama(llama())
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    even = as_mohd(dense, settings(4, 4, 3, router_init_std=1e-6), order)
    torch.testing.assert_close(even(ids_of()).logits, dense(ids_of()).logits, rtol=1e-4, atol=1e-4)
    small = as_mohd(dense, settings(4, 4, 3), order)
    off = (small(ids_of()).logits - dense(ids_of()).logits).norm() / dense(ids_of()).logits.norm()
    assert off < 0.05


def test_a_mixture_of_experts_does_not_start_from_a_dense_model() -> None:
    with pytest.raises(UserError, match=r"mohd\.experts: .* import into the settings of configs/mohd"):
        as_mohd(from_hf_llama(llama()), MoHDSettings(name="moe", experts=ExpertsConfig(6, 2, 1)))


def test_the_dims_that_matter_go_first() -> None:
    """Three of four sub-dimensions shared, a quarter of the dims without any weight: ordered by importance, nothing is lost."""
    theirs = llama()
    dead = torch.arange(48) % 4 == 0
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith(("embed_tokens.weight", "norm.weight", "layernorm.weight")):
                weight[..., dead] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[dead] = 0
    dense = from_hf_llama(theirs)
    found = importance(dense, ids_of())
    assert set(found.argsort()[:12].tolist()) == set(dead.nonzero()[:, 0].tolist())
    want = dense(ids_of()).logits

    def off(order: torch.Tensor | None) -> float:
        compressed = as_mohd(dense, settings(4, 3, 3, router_init_std=1e-6), order)
        return float((compressed(ids_of()).logits - want).norm() / want.norm())

    assert off(found.argsort(descending=True)) < 1e-4
    assert off(None) > 0.1


def expanded(expansion: int, n: int, **others: object) -> MoHDSettings:
    return settings(n, 4, 3, expansion=expansion, router_init_std=1e-6, **others)


@pytest.mark.parametrize(("expansion", "n"), [(2, 8), (3, 12), (4, 16)])
@pytest.mark.parametrize("which", ["both", "ffn"])
def test_an_expansion_computes_the_dense_models_function(expansion: int, n: int, which: str) -> None:
    """Whatever the routers pick; here with weights of 1, and tokens that pick different sub-dimensions."""
    dense = from_hf_llama(llama().double())
    asked = expanded(expansion, n)
    if which == "ffn":
        asked.attention = None
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    wide = as_mohd(dense, asked, order).double()
    out = wide(ids_of())
    chosen = {int(i) for layer in out.routing for i in layer.ffn.indices[:, -1]}
    assert len(chosen) > 1
    torch.testing.assert_close(out.logits, dense(ids_of()).logits, rtol=1e-4, atol=1e-4)
    assert wide.plan.hidden_size == expansion * 48


def test_every_copy_learns_on_its_own() -> None:
    """A copy that a token did not pick gets no gradient from it, so the copies part as soon as they train."""
    wide = as_mohd(from_hf_llama(llama()), expanded(2, 8)).train()
    labels = ids_of()
    out = wide(labels, labels_BT=labels)
    out.cross_entropy.backward()
    gradient = wide.blocks[0].ffn.up_proj.weight.grad.view(-1, 8, 12)[:, 3:]
    assert not torch.allclose(gradient[:, 0], gradient[:, 1])


def test_a_run_starts_from_an_import_and_resumes(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's shorter context is no obstacle, its function is the source's at the start, and a resume changes nothing."""
    from transformers import LlamaConfig

    from mohd_train.train.train import train

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64))
    theirs.save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    x2 = load_mohd([str(ROOT / "configs" / "mohd" / "x2.yaml")])
    start = import_llama(tmp_path / "hf", tmp_path / "x2", mohd=x2)
    state = torch.load(start, weights_only=False)  # the tests' data names no real tokenizer
    for metadata in state["state"]["callbacks"].values():
        metadata["tokenizer_sha256"] = "ab" * 32
    torch.save(state, start)

    def config(name: str) -> Config:
        files = [str(write_config(tmp_path, data)), str(tmp_path / "x2" / "model.yaml")]
        return load_config(
            files, [f"run_name={name}", f"load_path={start}", "load_weights_only=true", "autoresume=true"]
        )

    train(config("whole"))
    crash(config("parts"), 3, monkeypatch)
    train(config("parts"))
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")
    dense = load_native(import_llama(tmp_path / "hf", tmp_path / "dense")).transformer
    x2_model = load_native(start).transformer
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    off = (x2_model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    assert off < 0.05


def test_an_import_is_a_checkpoint_and_a_config(tmp_path: Path) -> None:
    theirs: LlamaForCausalLM = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    path = import_llama(tmp_path / "hf", tmp_path / "dense")
    torch.testing.assert_close(load_native(path)(ids_of()).logits, theirs(ids_of()).logits, rtol=1e-5, atol=1e-5)
    (tmp_path / "75.yaml").write_text(
        "mohd:\n  name: '75'\n  attention: {sub_dims: 4, top_k: 3, shared_sub_dims: 2}\n"
        "  ffn: {sub_dims: 4, top_k: 3, shared_sub_dims: 2}\n"
    )
    text = "w5 w6 w7 w8 " * 256
    path = import_llama(tmp_path / "hf", tmp_path / "75", mohd=load_mohd([str(tmp_path / "75.yaml")]), calibration=text)
    plan = load_model_plan([str(tmp_path / "75" / "model.yaml")], ["max_seq_len=64"])
    assert checkpoint.open(path).plan == plan


def test_what_cannot_be_imported_is_named(tmp_path: Path) -> None:
    dense = from_hf_llama(llama())
    for reason, asked in {
        "2 specialized .* where it takes 1": settings(8, 4, 2, expansion=2),
        "active sub-dimensions are 24 dims, the source's are 48": settings(8, 2, 1, expansion=2),
        "fusion is none": expanded(2, 8, fusion="none"),
        "no component has": MoHDSettings(name="wide", expansion=2),
    }.items():
        with pytest.raises(UserError, match=f"expansion is 2, but .*{reason}"):
            as_mohd(dense, asked)
    with pytest.raises(UserError, match="does not divide"):
        as_mohd(dense, settings(7, 3, 2))
    llama().save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    with pytest.raises(UserError, match="calibration text has 3 tokens"):
        import_llama(tmp_path / "hf", tmp_path / "out", mohd=settings(4, 3, 2), calibration="w5 w6 w7")
