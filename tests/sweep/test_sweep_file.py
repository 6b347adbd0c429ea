from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mohd_train.config.catalogue import DECOUPLED, model_name
from mohd_train.config.load import load_config
from mohd_train.config.schema import ModelConfig
from mohd_train.errors import UserError
from mohd_train.model.count import count
from mohd_train.sweep.expand import Choice, expand, total_batches
from mohd_train.sweep.file import CONFIGS, all_sweeps, read_sweep
from mohd_train.sweep.scale import SCALES, paper_name, scaled_model


def runs_of(name: str, scale: str = "paper", **choice: object) -> list:
    return expand(read_sweep(CONFIGS / "sweep" / f"{name}.yaml"), Choice(scale, **choice), Path("out"))  # type: ignore[arg-type]


def test_the_issue_s_sweeps_are_there() -> None:
    names = {sweep.name for sweep in all_sweeps()}
    assert names == {
        "table2",
        "table4",
        "table5",
        "fig12a",
        "fig12b",
        "readings",
        "routing",
        "balance_weight",
        "study",
        "study_lr",
    }
    assert all(sweep.path.stem == sweep.name for sweep in all_sweeps())


def test_table2_is_the_paper_s_nineteen_models(root: Path) -> None:
    paper = yaml.safe_load((root / "eval/paper/results.yaml").read_text())["table2_results"]
    runs = runs_of("table2")
    assert [f"{run.model}-{run.setting}" for run in runs] == [
        f"{r['base'].lower()}-{r['setting'].rstrip('%')}" for r in paper
    ]
    assert {total_batches(run.config) for run in runs} == {50000}


def test_table4_carries_the_paper_s_labels(root: Path) -> None:
    rows = yaml.safe_load((root / "eval/paper/results.yaml").read_text())["table4_ablation"]["rows"]
    labels = [run.label for run in runs_of("table4")]
    assert labels[1:5] == [row["method"] for row in rows[1:5]]
    by_name = {run.setting: run.plan for run in runs_of("table4")}
    full = by_name["x2"]
    assert by_name["x2-no-shared"].attention.shared == by_name["x2-no-shared"].ffn.shared == 0
    changed = {
        name: plan.differences(full) for name, plan in by_name.items() if name not in ("x2", "dense", "x2-no-shared")
    }
    assert changed == {
        "x2-no-balance": ["balance_loss_weight: 0.0 here, 0.01 there"],
        "x2-no-fusion": ["fusion: none here, grouped there"],
        "x2-no-scaling": ["scaling: none here, sum_to_active there"],
    }


def test_table5_is_the_decoupled_eight() -> None:
    runs = {run.setting: run for run in runs_of("table5")}
    expected = {model_name("355m", a, f).removeprefix("355m-") for a, f in DECOUPLED} | {"dense", "50"}
    assert set(runs) == expected
    millions = {name: round(count(run.plan).activated / 1e6, 1) for name, run in runs.items()}
    assert millions["attn100-ffn50"] == 195.0
    assert millions["attn25-ffn100"] == 213.9
    assert {count(run.plan).total for run in runs.values()} == {354_942_976}


def test_fig12_shares() -> None:
    shared = [(run.plan.ffn.shared, run.plan.ffn.top_k) for run in runs_of("fig12a")]
    assert shared == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    for run in runs_of("fig12b"):
        assert run.plan.ffn.top_k * 2 == run.plan.ffn.sub_dims
        assert run.plan.ffn.shared * 4 == run.plan.ffn.top_k * 3
    assert [run.plan.ffn.sub_dims for run in runs_of("fig12b")] == [8, 16, 32, 64, 128, 256]


def test_routing_alternatives() -> None:
    plans = {run.setting: run.plan for run in runs_of("routing", seeds=(1,))}
    assert plans["x2-random"].routing == "random"
    assert plans["x2-shared-only"].ffn.shared == plans["x2-shared-only"].ffn.top_k
    assert plans["x2-specialized-only"].ffn.shared == 0


@pytest.mark.parametrize("scale", ["tiny", "small", "medium"])
@pytest.mark.parametrize("name", ["table2", "fig12b"])
def test_every_scale_keeps_every_ratio(name: str, scale: str) -> None:
    for paper, small in zip(runs_of(name), runs_of(name, scale), strict=True):
        a, b = paper.plan, small.plan
        for width in ("hidden_size", "base_hidden_size", "intermediate_size", "query_width", "key_value_width"):
            assert getattr(a, width) == SCALES[scale].narrower * getattr(b, width), width
        assert b.num_hidden_layers == a.num_hidden_layers // SCALES[scale].shallower
        assert b.vocab_size == SCALES[scale].vocab_size
        for one, other in ((a.attention, b.attention), (a.ffn, b.ffn)):
            assert (one is None) == (other is None)
            if one and other:
                assert (one.sub_dims, one.top_k, one.shared) == (other.sub_dims, other.top_k, other.shared)
        assert b.name == f"{scale}-{a.name}"
        assert small.name == f"{scale}-{paper.name}"
        assert paper_name(small.model) == paper.model


@pytest.mark.parametrize(("scale", "activated"), [("small", 753_664), ("medium", 6_029_312)])
def test_scales_for_evidence_see_13_tokens_for_every_activated_parameter(scale: str, activated: int) -> None:
    for run in runs_of("table4", scale):
        batches, counts = total_batches(run.config), count(run.plan)
        assert counts.activated == activated
        assert batches is not None
        assert batches * run.config.global_train_batch_size * run.config.max_seq_len >= 13 * counts.activated
        assert all(part.width >= 8 for part in run.plan.components)


def test_tiny_refuses_what_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"hidden_size of odd is 100, no multiple of 8"):
        scaled_model(ModelConfig("odd", 100, 64, 2, 8, 8, 32), SCALES["tiny"])


def test_a_run_is_the_command_line_that_it_shows() -> None:
    for run in runs_of("table5", "tiny", seeds=(3,)):
        assert load_config(list(run.files), list(run.overrides)) == run.config
        assert run.config.run_name == run.name == f"{run.model}-{run.setting}-s3"
        assert run.config.seed == run.config.data.shuffle_seed == 3


def test_seeds_only_and_overrides(sweep_file: Path) -> None:
    sweep = read_sweep(sweep_file)
    runs = expand(sweep, Choice("tiny", (1, 2), ("x2", "*dense-s2"), ("optimizer.lr=0.5",)), Path("out"))
    assert [run.name for run in runs] == ["tiny-355m-x2-s1", "tiny-355m-dense-s2", "tiny-355m-x2-s2"]
    assert {run.config.optimizer.lr for run in runs} == {0.5}
    with pytest.raises(UserError, match=r"--only x2-nofusion: .*did you mean 'x2-no-fusion'"):
        expand(sweep, Choice(only=("x2-nofusion",)), Path("out"))
    with pytest.raises(UserError, match="the sweep itself sets run_name"):
        expand(sweep, Choice(overrides=("run_name=mine",)), Path("out"))
    with pytest.raises(
        UserError, match=r"small.yaml: 355m, dense: override 'optimizer.lrr=1': unknown key 'optimizer.lrr'"
    ):
        expand(sweep, Choice(overrides=("optimizer.lrr=1",)), Path("out"))


def test_blocks_may_have_seeds_keys_and_a_suffix(sweep_file: Path) -> None:
    sweep_file.write_text(
        sweep_file.read_text()
        + """
  - models: [355m]
    seeds: [4, 5]
    suffix: slow
    label: half the rate
    set: {optimizer.lr: 1.0e-3, mohd.fusion: monarch}
    settings: [x2, {name: x2-no-fusion, base: x2, set: {mohd.fusion: none}}]
comparisons:
  - {title: fusion, baseline: x2, paper: 10.25, rows: {x2-no-fusion: 10.47}, variants: [null, slow]}
  - {title: rates, rows: [x2]}
"""
    )
    sweep = read_sweep(sweep_file)
    runs = {run.name: run for run in expand(sweep, Choice("small"), Path("out"))}
    assert list(runs)[3:] == [f"small-355m-{name}-slow-s{seed}" for seed in (4, 5) for name in ("x2", "x2-no-fusion")]
    slow = runs["small-355m-x2-slow-s4"]
    assert (slow.label, slow.seed, slow.config.optimizer.lr) == ("x2, half the rate", 4, 1e-3)
    assert (slow.plan.fusion, slow.plan.name) == ("monarch", "small-355m-x2-slow")
    assert runs["small-355m-x2-no-fusion-slow-s5"].plan.fusion == "none"  # the setting's own word counts
    assert runs["small-355m-x2-s1"].config.optimizer.lr == 4e-3
    assert sweep.seeds == (1, 4, 5)
    assert {run.seed for run in expand(sweep, Choice("small", (9,)), Path("out"))} == {9}
    again = sweep_file.read_text().replace(
        "comparisons:", "  - {models: [355m], seeds: [6], settings: [x2]}\ncomparisons:"
    )
    sweep_file.write_text(again)
    more = expand(
        read_sweep(sweep_file), Choice("small", (9,)), Path("out")
    )  # x2 of two blocks that differ in their seeds: once
    assert [run.name for run in more].count("small-355m-x2-s9") == 1
    fusion, rates = sweep.comparisons
    assert (fusion.baseline, fusion.paper, fusion.rows) == ("x2", 10.25, {"x2-no-fusion": 10.47})
    assert (fusion.variants, rates.variants, rates.baseline) == (("", "slow"), ("",), None)


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        ("{title: a, baseline: x3, rows: [x2]}", r"comparisons\[0\] compares 'x3', which no entry of runs has"),
        ("{title: a, rows: [x2-nofusion]}", r"compares 'x2-nofusion'.*did you mean 'x2-no-fusion'"),
        ("{title: a, rows: [x2], variants: [slow]}", r"compares 'x2-slow'"),
        ("{title: a, rows: {x2: ten}}", r"comparisons\[0\].rows.x2 is 'ten'; it must be a perplexity"),
        ("{title: a, rows: {x2: 0.5}}", r"is 0.5; it must be a perplexity"),
        ("{title: a, row: [x2]}", r"unknown key 'comparisons\[0\].row' \(did you mean 'rows'"),
        ("{rows: [x2]}", r"comparisons\[0\].title is missing"),
    ],
)
def test_bad_comparisons_are_named(sweep_file: Path, comparison: str, message: str) -> None:
    sweep_file.write_text(f"{sweep_file.read_text()}comparisons: [{comparison}]\n")
    with pytest.raises(UserError, match=message):
        read_sweep(sweep_file)


def test_the_study_carries_the_paper_s_perplexities(root: Path) -> None:
    paper = yaml.safe_load((root / "eval/paper/results.yaml").read_text())
    table4 = {row["method"]: row["perplexity"] for row in paper["table4_ablation"]["rows"]}
    theirs = {"x2": table4["MoHD x2 -710M"], "dense": table4["LLaMA2-355M"]}
    theirs |= {run.setting: table4[run.label] for run in runs_of("table4") if run.label in table4}
    for row in paper["table5_decoupled"]["rows"]:
        attention, ffn = row["attention"].rstrip("%"), row["ffn"].rstrip("%")
        theirs[model_name("355m", attention, ffn).removeprefix("355m-")] = row["perplexity"]
    assert len(theirs) == 13
    said = 0
    for comparison in read_sweep(CONFIGS / "sweep" / "study.yaml").comparisons:
        if comparison.paper is not None:
            assert comparison.paper == theirs[comparison.baseline], comparison.title
            printed = {name: value for name, value in comparison.rows.items() if name != "moe-x2"}  # the paper has none
            assert printed == {name: theirs[name] for name in printed}, comparison.title
            assert comparison.rows.get("moe-x2") is None
            said += len(printed)
    assert said == 18


def test_the_study_has_every_run_once_and_all_that_the_paper_s_tables_want() -> None:
    runs = runs_of("study", "small")
    computed = {
        yaml.safe_dump({**run.plan.to_dict(), "name": None, "seed": run.seed, "lr": run.config.optimizer.lr})
        for run in runs
    }
    assert len(computed) == len(runs) == 121  # none of them computes what another does
    by_seed = {seed: {run.setting for run in runs if run.seed == seed} for seed in (17, 18, 19)}
    for name in ("table4", "table5", "fig12a"):
        wanted = {run.setting for run in runs_of(name)} - {"x2-shared0"}  # x2-no-shared
        assert all(wanted <= settings for settings in by_seed.values()), name
    assert all({"50", "75", "x3", "x4", "moe-x2", "moe-x2-normal"} <= settings for settings in by_seed.values())
    assert {run.config.data.shuffle_seed for run in runs if run.seed == 18} == {18}  # paired by seed
    assert {(run.plan.init, run.plan.router_init_std) for run in runs} == {
        (i, s) for i in ("torch", "normal") for s in (None, 0.1)
    }


def test_learning_rates_are_tried_for_three_models_under_both_initializations() -> None:
    tried: dict[tuple[str, str], list[float]] = {}
    for run in runs_of("study_lr", "small"):
        tried.setdefault((run.setting.partition("-")[0], run.plan.init), []).append(run.config.optimizer.lr)
    assert tried.keys() == {(name, init) for name in ("dense", "x2", "50") for init in ("torch", "normal")}
    assert all(sorted(rates) == [1e-3, 2e-3, 4e-3, 8e-3] for rates in tried.values())


def test_own_files_stand_beside_the_sweep(tmp_path: Path, sweep_file: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mohd: {name: mine, expansion: 3}")
    sweep_file.write_text(sweep_file.read_text().replace("[dense,", "[mine.yaml,"))
    runs = expand(read_sweep(sweep_file), Choice(), Path("out"))
    assert runs[0].plan.hidden_size == 3 * 1024


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("recipe:", "recipee:", r"unknown key 'recipee' \(did you mean 'recipe'\?\)"),
        ("recipe: ablation_10b", "", "recipe is missing"),
        (
            "ablation_10b",
            "ablation_9b",
            r"recipe is 'ablation_9b', which configs/recipe does not have \(did you mean 'ablation_10b'",
        ),
        ("[355m]", "[356m]", r"runs\[0\].models is '356m', which configs/model does not have \(did you mean '355m'"),
        ("[355m]", "355m", r"runs\[0\].models is '355m'; it must be a list"),
        ("[dense,", "[mine.yaml,", r"runs\[0\].settings\[0\] names mine.yaml, and there is no file"),
        ("base: x2, set", "bose: x2, set", r"unknown key 'runs\[0\].settings\[2\].bose' \(did you mean 'base'"),
        (
            "set: {mohd.fusion: none}",
            "both: {top_k: two}",
            r"\(x2-no-fusion\).both.top_k is 'two'; it must be a whole number",
        ),
        (", set: {mohd.fusion: none}", "", r"does not differ from x2"),
        ("set: {mohd.fusion: none}", "both: {top_k: 2}, ffn: '50'", "exclude each other"),
        ("name: x2-no-fusion", "name: a/b", "is 'a/b'; it must be a name of letters"),
        ("[1]", "[one]", "seeds holds 'one'"),
        ("[1]", "[]", r"seeds is \[\]; it must be a list of at least one"),
        ("runs:", "runs: [", "broken YAML at line"),
        ("\nname: small\n", "\n- name: small\n", "broken YAML"),
    ],
)
def test_bad_files_are_named(sweep_file: Path, old: str, new: str, message: str) -> None:
    text = sweep_file.read_text()
    assert old in text
    sweep_file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(sweep_file)
    assert str(sweep_file) in str(caught.value)


def test_bad_settings_are_named_with_the_run(sweep_file: Path) -> None:
    text = sweep_file.read_text()
    sweep_file.write_text(text.replace("mohd.fusion: none", "mohd.fusoin: none"))
    with pytest.raises(
        UserError, match=r"355m, x2-no-fusion: override .*unknown key 'mohd.fusoin' \(did you mean 'mohd.fusion'"
    ):
        expand(read_sweep(sweep_file), Choice(), Path("out"))
    sweep_file.write_text(text.replace("set: {mohd.fusion: none}", "ffn: '50'"))
    with pytest.raises(UserError, match="ffn of 50 is 1024 wide, x2 is 2048"):
        expand(read_sweep(sweep_file), Choice(), Path("out"))
    sweep_file.write_text(text.replace("[dense,", "[dense, dense,"))
    with pytest.raises(UserError, match="two runs are called 355m-dense-s1"):
        expand(read_sweep(sweep_file), Choice(), Path("out"))


def test_no_such_file_names_those_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such sweep file; configs/sweep has .*table2"):
        read_sweep(tmp_path / "table9.yaml")


def test_a_name_that_yaml_reads_as_a_number_is_refused(tmp_path: Path) -> None:
    """1.10 would become 1.1: another name, and another run's folder."""
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "name: a\ntitle: b\nrecipe: tiny\nseeds: [1]\nruns:\n  - models: [tiny]\n    settings: [x2]\n    set: {mohd.name: 1.10}\n"
    )
    with pytest.raises(UserError, match=r"set\.mohd\.name is 1\.1, .*put it in quotes"):
        read_sweep(file)
