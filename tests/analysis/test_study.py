"""The study on models whose activations are known, and on the architectures it must understand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.analysis import gpt2, hf_folder, llama, native, subject_of, text_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from mohd_train.analysis.architecture import POINTS, find_blocks, hooked
from mohd_train.analysis.corpus import Corpus, open_corpus
from mohd_train.analysis.figures import shown_token
from mohd_train.analysis.options import StudyOptions
from mohd_train.analysis.study import observe, token_texts
from mohd_train.errors import UserError

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.factor * x, None


class ResidualScale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.factor * x


class ScaleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Scale(0.5), ResidualScale(2.0)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.self_attn(x)[0]
        return self.mlp(h, residual=h)


class ScaleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ScaleBlock(), ScaleBlock()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def test_hooks_see_what_components_contribute_and_nothing_else() -> None:
    model, x = ScaleModel(), torch.randn(2, 3, 4)
    seen: dict[tuple[int, str], Tensor] = {}
    with hooked(find_blocks(model), lambda layer, point, y: seen.update({(layer, point): y})) as hooks:
        model(x)
    assert set(seen) == {(layer, point) for layer in (0, 1) for point in POINTS}
    for layer, grown in enumerate((1.0, 4.5)):  # x -> 1.5 x -> 1.5 x + 2 * 1.5 x
        factors = (1, 1, 0.5, 1.5, 1.5, 3, 4.5)
        for point, factor in zip(POINTS, factors, strict=True):
            assert torch.allclose(seen[layer, point], grown * factor * x, atol=1e-5), point
    assert max(hooks.residual_error) < 1e-6
    seen.clear()
    model(x)
    assert not seen  # the hooks are gone


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hugging_face_models_are_understood(make, tmp_path: Path) -> None:
    subject = subject_of(hf_folder(make(), tmp_path / "model"))
    corpus = open_corpus(text_folder(tmp_path / "text"), subject, 32)
    record = observe(subject, corpus, StudyOptions(tokens=256, shares=(0.25,)))
    assert record["tokens"] == {"code": 128, "wiki": 128}
    assert (record["hidden_size"], record["layer"], record["top_dims"]) == (32, 1, 8)
    assert max(record["residual_error"]) < 1e-5
    for layer in record["layers"]:
        assert layer["flow_percent_of_block_input"]["block_in"] == pytest.approx(100)
        assert all(0 <= layer["points"][point]["sparsity"] <= 1 for point in POINTS)
    closely = record["closely"]["attention_in"]
    assert closely["curve"][-1] == pytest.approx(1, abs=1e-6)
    assert closely["curve"] == sorted(closely["curve"])
    assert closely["common_activity"][0]["common"]["1"] == pytest.approx(8)
    assert len(record["map_tokens"]) == 5
    assert record["map_tokens"][0].strip().startswith(("w", "<", "</"))
    assert record["gaussian"]["curve"][-1] == pytest.approx(1, abs=1e-6)
    assert len(record["gaussian"]["curve"]) == 32
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("model", "config", "exact"),
    [
        (
            BloomForCausalLM,
            BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
            True,
        ),  # adds the residual itself
        (FalconForCausalLM, FalconConfig(**SMALL), True),  # both in parallel, added in place
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, intermediate_size=48), True),
        (
            MixtralForCausalLM,
            MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=3),
            True,
        ),
        (Olmo2ForCausalLM, Olmo2Config(**SMALL, intermediate_size=48), False),  # norms behind the components
    ],
)
def test_residual_error_tells_blocks_that_are_sums_from_others(model, config, exact: bool) -> None:
    built, seen = model(config).eval(), []
    with torch.no_grad(), hooked(find_blocks(built), lambda layer, point, _: seen.append((layer, point))) as hooks:
        built(torch.randint(4, 97, (2, 8)), use_cache=False)
    assert sorted(seen) == sorted((layer, point) for layer in (0, 1) for point in POINTS)
    assert (max(hooks.residual_error) < 1e-5) == exact


def test_norm_input_of_llama_is_what_the_hook_reports(tmp_path: Path) -> None:
    model = llama()
    ids = torch.randint(4, 97, (2, 16))
    seen: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad(), hooked(find_blocks(model), lambda layer, point, y: seen.update({(layer, point): y})):
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(seen[1, "block_in"], states[1])
    assert torch.allclose(seen[1, "attention_in"], model.model.layers[1].input_layernorm(states[1]))


@pytest.mark.parametrize("setting", ["dense", "x2"])
def test_our_checkpoints_are_understood(setting: str, tmp_path: Path) -> None:
    subject = subject_of(native(tmp_path / "run", setting))
    corpus = open_corpus(text_folder(tmp_path / "text"), subject, 32)
    record = observe(subject, corpus, StudyOptions(tokens=128))
    assert record["hidden_size"] == subject.transformer.plan.hidden_size
    assert max(record["residual_error"]) < 1e-5
    assert subject.info["plan"]["name"] == f"small-{setting}"


class ScaleSubject:
    """What `observe` needs of a subject, around a model whose flow is known: see ScaleBlock."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.device, self.hidden_size, self.tokenizer = _Embedded(), torch.device("cpu"), 16, None


class _Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(9, 16), ScaleModel()
        with torch.no_grad():
            self.embedding.weight[8] *= 1e4  # a token as loud as a massive activation

    def forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        return self.body(self.embedding(ids))


@pytest.mark.parametrize(("magnitude", "power"), [("square", 2), ("absolute", 1)])
@torch.no_grad()
def test_the_flow_is_the_ratio_of_magnitudes(magnitude: str, power: int) -> None:
    """A block that adds 0.5 x and then 2 * 1.5 x: in squares, attention gives 25% of its input and the block 2025%."""
    corpus = Corpus(4, {"some": lambda: iter([np.array([1, 2, 3, 8])])}, {})
    record = observe(ScaleSubject(), corpus, StudyOptions(tokens=4, shares=(0.25,), magnitude=magnitude))  # type: ignore[arg-type]
    for layer in record["layers"]:
        for suffix in ("", "_per_token"):
            flow = layer[f"flow_percent_of_block_input{suffix}"]
            for point, factor in (("attention_out", 0.5), ("after_attention", 1.5), ("ffn_out", 3), ("block_out", 4.5)):
                assert flow[point] == pytest.approx(100 * factor**power, rel=1e-5), (point, suffix)
            own = layer[f"flow_percent_of_own_input{suffix}"]
            assert own["attention"] == pytest.approx(100 * 0.5**power, rel=1e-5)
            assert own["ffn"] == pytest.approx(100 * 2**power, rel=1e-5)


@torch.no_grad()
def test_one_loud_token_decides_the_ratio_of_means_and_not_the_typical_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What massive activations do to SmolLM2: the attention leaves the loud token alone and halves the others."""
    monkeypatch.setattr(
        Scale, "forward", lambda self, x: (self.factor * x * (x.abs().amax(-1, keepdim=True) < 100), None)
    )
    corpus = Corpus(16, {"some": lambda: iter([np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 8])])}, {})
    record = observe(ScaleSubject(), corpus, StudyOptions(tokens=16, shares=(0.25,)))  # type: ignore[arg-type]
    layer = record["layers"][0]
    assert layer["flow_percent_of_block_input_per_token"]["attention_out"] == pytest.approx(25)
    assert layer["flow_percent_of_block_input"]["attention_out"] < 1e-3


def test_tokens_are_shown_as_text(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    for merged in ("di", "did", "\u0120did"):
        vocabulary[merged] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [("d", "i"), ("di", "d"), ("\u0120", "did")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("did did\n$\u00e9")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[1] == "\u0120did"
    assert token_texts(tokenizer, ids) == ["did", " did", "\n", "$", "\ufffd", "\ufffd"]  # two bytes of one letter
    assert token_texts(None, ids[:1]) == [str(ids[0])]
    shown = [shown_token(text) for text in token_texts(tokenizer, ids)]
    assert shown[:4] == ['"did"', '" did"', '"\\n"', '"$"']
    assert all(ord(c) < 0x250 for c in shown_token("\u0e2a \t"))


def test_the_map_clusters_dims_by_the_tokens_they_are_active_in(tmp_path: Path) -> None:
    from mohd_train.analysis.study import _map

    x = torch.full((3, 10), 0.01)
    x[:, 4] = torch.tensor([1.0, -2.0, 3.0])  # in all
    x[0, 7] = x[1, 2] = x[2, 2] = 0.5  # 7 in the first only, 2 in the others
    found = _map(x, 0.2, "absolute")
    assert found["dims"] == [4, 2, 7]
    assert found["active"] == [[1, 0, 1], [1, 1, 0], [1, 1, 0]]
    assert (found["active_in_all"], found["active_in_one_only"]) == (1, 1)
    assert found["active_in_one_only_by_token"] == [1, 0, 0]
    assert found["relative"][0][2] == pytest.approx(0.5)
    assert _map(x, 0.2)["relative"][0][2] == pytest.approx(0.25)  # squares

    many = torch.full((70, 10), 0.01)  # more tokens than an int64 has bits: the first ones must count too
    many[:, 4], many[0, 7], many[1, 2] = 1.0, 0.5, 0.6
    many[2:, 9] = 0.02
    assert _map(many, 0.2)["dims"] == [4, 9, 7, 2]


def test_architectures_that_are_not_understood_are_named() -> None:
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )
    with pytest.raises(
        UserError, match=r"OPTForCausalLM isn't understood: none of the parts of its block 0 .* is its ffn"
    ):
        find_blocks(opt)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(UserError, match=r"is its attention; name the part with --attention-module"):
        find_blocks(mamba)
    assert find_blocks(llama(), "self_attn", "mlp")[0].ffn is not None
    with pytest.raises(UserError, match="none of the parts"):
        find_blocks(llama(), ffn="mlp2")


def test_bad_options_are_named(tmp_path: Path) -> None:
    subject = subject_of(hf_folder(llama(), tmp_path / "model"))
    corpus = open_corpus(text_folder(tmp_path / "text"), subject, 32)
    for options, message in (
        (StudyOptions(layer=3), "layers 0 .. 2"),
        (StudyOptions(top_dims=33), "the model has 32 dims"),
        (StudyOptions(shares=(20.0,)), "between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            observe(subject, corpus, options)
