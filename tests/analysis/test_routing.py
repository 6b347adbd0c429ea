"""The router's view, against a count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.analysis import native, subject_of, text_folder

from mohd_train.analysis.corpus import open_corpus
from mohd_train.analysis.routing import router_selection, tally_routing
from mohd_train.errors import UserError


@torch.no_grad()
def test_means_by_domain_equal_a_count_by_hand(tmp_path: Path) -> None:
    checkpoint, text = native(tmp_path / "run", spread=0.2), text_folder(tmp_path / "text")
    found = router_selection(checkpoint, text, layer=1, component="ffn", tokens_per_domain=128)
    subject = subject_of(checkpoint)
    assert found.tokens == {"code": 128, "wiki": 128}
    for domain in ("code", "wiki"):
        ids = next(b for b in open_corpus(text, subject).batches(256, 4) if b.domain == domain).ids_BT
        assert ids.shape == (2, 64)
        routing = subject.transformer(ids).routing[1].ffn
        assert found.probability[domain] == pytest.approx(routing.scores.mean(dim=0).tolist(), abs=1e-6)
        counts = torch.bincount(routing.indices.flatten(), minlength=8) / 128
        assert found.selected[domain] == pytest.approx(counts.tolist())
        assert found.specialized_probability[domain][:3] == [None] * 3
        special = routing.scores[:, 3:] / routing.scores[:, 3:].sum(dim=1, keepdim=True)
        assert found.specialized_probability[domain][3:] == pytest.approx(special.mean(dim=0).tolist(), abs=1e-6)
        assert sum(found.probability[domain]) == pytest.approx(1)
        assert sum(found.selected[domain]) == pytest.approx(4)


def test_overall_is_the_mean_over_domains_of_equal_size(tmp_path: Path) -> None:
    subject = subject_of(native(tmp_path / "run", spread=0.2))
    tally = tally_routing(subject, open_corpus(text_folder(tmp_path / "text"), subject, 32), 256)
    selected, probability = tally.overall(0, "attention")
    by_domain = tally.selection(0, "attention")
    assert selected[:3] == [1, 1, 1]
    for index in range(8):
        assert selected[index] == pytest.approx(sum(by_domain.selected[d][index] for d in ("code", "wiki")) / 2)
        assert probability[index] == pytest.approx(sum(by_domain.probability[d][index] for d in ("code", "wiki")) / 2)


def test_no_router_no_view(tmp_path: Path) -> None:
    text = text_folder(tmp_path / "text")
    checkpoint = native(tmp_path / "run", attention=None)
    with pytest.raises(UserError, match="attention is dense"):
        router_selection(checkpoint, text, layer=0)
    with pytest.raises(UserError, match=r"layers 0 .. 1"):
        router_selection(checkpoint, text, layer=5, component="ffn")
    with pytest.raises(UserError, match="give attention or ffn"):
        router_selection(checkpoint, text, layer=0, component="mlp")
    with pytest.raises(UserError, match="has no sub-dimensions"):
        router_selection(native(tmp_path / "dense", "dense"), text, layer=0)
