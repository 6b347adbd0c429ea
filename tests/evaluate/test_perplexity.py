"""Validation perplexity per domain: the mathematics, the whole path on prepared data, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.s3_server import BUCKET, S3Server
from torch import nn
from transformers import AutoModelForCausalLM

from mohd_train.config.schema import DataConfig
from mohd_train.data.manifest import load_manifest
from mohd_train.data.prepare import Request, prepare
from mohd_train.data.streaming import build_eval_loaders
from mohd_train.errors import UserError
from mohd_train.evaluate.options import EvalOptions, PerplexityOptions, parse
from mohd_train.evaluate.perplexity import Likelihood, likelihood, run_perplexity, total
from mohd_train.results import store as results

DOMAINS = {"cc": "the cat saw the dog near the river ", "wiki": "a river is a stream of water that flows to the sea "}


@pytest.fixture(scope="module")
def prepared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "out"
    for domain, text in DOMAINS.items():
        (raw / domain).mkdir()
        rows = [json.dumps({"text": f"{i} {text * (1 + i % 3)}", "meta": {}}) for i in range(300)]
        (raw / domain / "a.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    request = Request(str(raw), str(out), str(llama), seq_len=32, val_tokens=800, workers=1, show_progress=False)
    prepare(request)
    return out


class Constant(nn.Module):
    """Gives every token its fixed probability, whatever came before."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.log_V = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.log_V.expand(*input_ids.shape, -1))


def test_stored_on_object_storage(
    llama: Path, prepared: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(options(llama, prepared, Path()), output=f"s3://{BUCKET}/eval")
    for words in ("", "perplexity: reused from "):
        run_perplexity(asked)
        assert f"{words or 'results: '}s3://{BUCKET}/eval/tiny-llama/perplexity.json" in capsys.readouterr().out


def test_likelihood_of_known_probabilities() -> None:
    batches = [{"input_ids": torch.tensor([[0, 1, 2], [2, 1, 1]])}, {"input_ids": torch.tensor([[1, 0, 0]])}]
    found = likelihood(Constant([0.5, 0.25, 0.25]), batches)  # the first token of a sample is not predicted
    assert found.tokens == 6
    assert found.nll == pytest.approx(-math.log(0.25 * 0.25 * 0.25 * 0.25 * 0.5 * 0.5))
    uniform = likelihood(Constant([1 / 3] * 3), batches)
    assert uniform.perplexity == pytest.approx(3)


def test_likelihood_of_each_document() -> None:
    """Two samples of one stream, 2 ends a document: the second document runs on from one sample into the next, whose first token
    is not predicted; the last holds nothing predicted yet."""
    batches = [{"input_ids": torch.tensor([[0, 1, 2, 0], [1, 1, 2, 0], [1, 0, 0, 2]])}]
    found = likelihood(Constant([0.5, 0.25, 0.25]), batches, eos_id=2)
    assert found.documents is not None
    assert found.documents.tokens == [2, 3, 4]
    half, quarter = math.log(2), math.log(4)
    assert found.documents.nll == pytest.approx([2 * quarter, half + 2 * quarter, 3 * half + quarter])
    assert sum(found.documents.nll) == pytest.approx(found.nll)
    assert sum(found.documents.tokens) == found.tokens


def test_total_weighs_tokens_not_domains() -> None:
    whole = total({"a": Likelihood(10, 20.0), "b": Likelihood(30, 30.0)})
    assert whole.loss == pytest.approx(50 / 40)
    assert Likelihood(1, 1e4).perplexity == math.inf


def options(checkpoint: Path, data: Path, output: Path) -> PerplexityOptions:
    return PerplexityOptions(checkpoint, data, output, device="cpu", batch_size=3)


def test_whole_path_equals_transformers_own_loss(llama: Path, prepared: Path, tmp_path: Path) -> None:
    assert run_perplexity(options(llama, prepared, tmp_path)) == 0
    stored = json.loads((tmp_path / "tiny-llama" / "perplexity.json").read_text(encoding="utf-8"))["mohd_train"]
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    manifest = load_manifest(prepared)
    data = DataConfig(local=str(prepared), domains=dict.fromkeys(DOMAINS, 1.0), num_workers=0)
    everything = Likelihood(0, 0.0)
    for domain, loader in build_eval_loaders(data, manifest, device_batch_size=1).items():
        with torch.no_grad():
            losses = [float(model(input_ids=b["input_ids"], labels=b["input_ids"]).loss) for b in loader]
        assert len(losses) == manifest.samples(domain, "val") > 0
        assert stored["domains"][domain]["tokens"] == 31 * len(losses)
        assert stored["domains"][domain]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        documents = stored["domains"][domain]["documents"]
        assert (
            len(documents["tokens"]) >= manifest.domains[domain]["val"].documents - 1
        )  # the tail that fills no sample is cut
        assert sum(documents["tokens"]) == stored["domains"][domain]["tokens"]
        assert sum(documents["nll"]) == pytest.approx(stored["domains"][domain]["nll"])
        everything = Likelihood(everything.tokens + 31 * len(losses), everything.nll + 31 * sum(losses))
    assert manifest.samples("cc", "val") > 3  # more than a batch
    assert stored["total"]["perplexity"] == pytest.approx(everything.perplexity, rel=1e-5)


def test_stored_perplexity_is_reused_or_refused(
    llama: Path, prepared: Path, make_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options(llama, prepared, tmp_path)
    run_perplexity(asked)
    run_perplexity(asked)
    assert capsys.readouterr().out.count("reused from") == 1
    with pytest.raises(UserError, match="made with other limit"):
        run_perplexity(replace(asked, limit=1))
    with pytest.raises(UserError, match="another checkpoint"):
        run_perplexity(replace(asked, checkpoint=make_llama(seed=1)))
    assert run_perplexity(replace(asked, limit=1, overwrite=True)) == 0
    path = next(tmp_path.rglob("perplexity.json"))
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    capsys.readouterr()
    assert run_perplexity(replace(asked, limit=1)) == 0
    assert "set aside as perplexity.json.broken" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no results"):  # no result of a task
        results.find([tmp_path])


def test_a_limit_is_in_batches_so_their_size_is_part_of_the_measurement(
    llama: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(options(llama, prepared, tmp_path), limit=1)
    run_perplexity(asked)
    with pytest.raises(UserError, match="made with other batch_size"):
        run_perplexity(replace(asked, batch_size=2))
    run_perplexity(replace(asked, limit=None, overwrite=True))
    capsys.readouterr()
    run_perplexity(replace(asked, limit=None, batch_size=2))
    assert "reused from" in capsys.readouterr().out


def test_a_likelihood_that_is_no_number_is_refused(
    make_llama: Callable[..., Path], prepared: Path, tmp_path: Path
) -> None:
    path = make_llama()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    model.save_pretrained(path)
    assert math.isnan(Likelihood(1, math.nan).perplexity)
    with pytest.raises(UserError, match=r"cc: the model's log-likelihood is not a number \(NaN\)"):
        run_perplexity(options(path, prepared, tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_data_must_be_the_models(prepared: Path, make_llama: Callable[..., Path], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="samples of 32 tokens, longer than the model's 16"):
        run_perplexity(options(make_llama(context=16), prepared, tmp_path))
    with pytest.raises(UserError, match="another tokenizer"):
        run_perplexity(options(make_llama(vocab_size=590), prepared, tmp_path))
    with pytest.raises(UserError, match="has no domain 'cd'; it has cc, wiki"):
        run_perplexity(replace(options(llama, prepared, tmp_path), domains=["cd"]))
    with pytest.raises(UserError, match="manifest"):
        run_perplexity(options(llama, tmp_path, tmp_path))


def test_command_line() -> None:
    base = ["--checkpoint", "c"]
    assert parse(None, [*base, "--tasks", "sciq,piqa", "mmlu"]) == EvalOptions(
        Path("c"), Path("eval/results"), ["sciq", "piqa", "mmlu"], batch_size="8"
    )
    asked = parse(None, [*base, "--perplexity", "--data", "d", "--domains", "cc"])
    assert asked == PerplexityOptions(Path("c"), Path("d"), Path("eval/results"), ["cc"])
    for wrong in (
        ["--perplexity"],
        ["--data", "d"],
        ["--perplexity", "--data", "d", "--tasks", "sciq"],
        ["--dat", "d"],
    ):
        with pytest.raises(SystemExit) as ended:
            parse(None, [*base, *wrong])
        assert ended.value.code == 2
