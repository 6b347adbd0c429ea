from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mohd_train.config.compare import config_differences
from mohd_train.config.keys import KNOWN_KEYS
from mohd_train.config.load import load_config, load_model_plan, to_yaml
from mohd_train.config.plan import ModelPlan
from mohd_train.errors import UserError


def test_files_merge_left_to_right_then_overrides(files: list[str], tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("max_duration: 30ba\noptimizer: {lr: 1e-3}\n")
    config = load_config(
        [*files, str(later)], ["optimizer.betas=[0.8,0.9]", "mohd.attention=null", "data.domains.cc=0.5"]
    )
    assert (config.max_duration, config.optimizer.lr, config.optimizer.betas) == ("30ba", 1e-3, [0.8, 0.9])
    assert config.mohd.attention is None
    assert config.mohd.ffn is not None
    assert config.data.domains == {"cc": 0.5, "wiki": 1.0}
    assert (config.run_name, config.save_folder) == ("355m-x2", "runs/355m-x2/checkpoints")
    assert config.optimizer.router_lr == 1e-3  # follows lr unless set


def test_a_mix_is_replaced_whole(files: list[str]) -> None:
    assert load_config(files, ["data.domains={arxiv: 1}"]).data.domains == {"arxiv": 1.0}


def test_print_and_read_back(files: list[str], tmp_path: Path) -> None:
    config = load_config(files, ["loggers.wandb={project: mine}", "fsdp_config={sharding_strategy: FULL_SHARD}"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config([str(again)]) == config


BAD = [
    ("data.shuffle_block_size=-3", "data.shuffle_block_size is -3; it must be at least 1"),
    ("data.num_canonical_nodes=0", "data.num_canonical_nodes is 0; it must be at least 1"),
    ("data.predownload=-1", "data.predownload is -1; it must be at least 0"),
    ("data.download_retry=-1", "data.download_retry is -1; it must be at least 0"),
    ("data.download_timeout=0", "data.download_timeout is 0.0; it must be a positive number"),
    ("data.download_timeout=nan", "data.download_timeout is nan; it must be a positive number"),
    ("data.worker_timeout=nan", "data.worker_timeout is nan; it must be a number of seconds"),
    ("modl.name=3", "unknown key 'modl' (did you mean 'model'?)"),
    ("mohd.attention.topk=3", "unknown key 'mohd.attention.topk' (did you mean 'mohd.attention.top_k'?)"),
    ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
    ("seed=abc", "seed: Value 'abc'"),
    ("optimizer.lr=x", "optimizer.lr: Value 'x'"),
    ("model=3", "model is 3; it must be a mapping"),
    (
        "mohd.ffn.sub_dims=7",
        "does not divide the hidden size 2048 (mohd.expansion x model.hidden_size); nearest that do: 2, 4, 8",
    ),
    ("mohd.attention.top_k=9", "mohd.attention.top_k is 9; it must lie in 1 .. mohd.attention.sub_dims = 8"),
    ("mohd.attention.shared_sub_dims=5", "it must lie in 0 .. mohd.attention.top_k = 4"),
    ("model.num_key_value_heads=5", "not a multiple of model.num_key_value_heads = 5"),
    ("model.head_dim=31", "rotary embeddings need an even number"),
    (
        "mohd.scaling=loud",
        "mohd.scaling is 'loud'; it must be one of sum_to_active, sum_to_all, subdims, gate_mass, none",
    ),
    ("mohd.balance_count=best", "mohd.balance_count is 'best'; it must be one of selected, highest"),
    ("mohd.balance_scores=some", "must be one of specialized, all"),
    ("mohd.router_input=logits", "must be one of normalized, residual"),
    ("model.init=xavier", "model.init is 'xavier'; it must be one of normal, torch"),
    ("mohd.router_init_std=-1", "mohd.router_init_std is -1.0; it must be 0 or positive, or null"),
    ("mohd.router_init_std=.nan", "mohd.router_init_std is nan"),
    ("mohd.balance_loss_weight=.inf", "mohd.balance_loss_weight is inf"),
    ("max_duration=5", "max_duration is '5'; it must be a number with a unit"),
    ("max_duration=0ba", "must be more than 0"),
    ("device=tpu", "device is 'tpu'; it must be one of auto, cpu, gpu"),
    ("device_train_microbatch_size=big", "must be 'auto' or at least 1"),
    ("optimizer.lr=.nan", "optimizer.lr is nan"),
    ("data.domains={}", "data.domains is empty"),
    ("data.domains.cc=-1", "data.domains.cc is -1.0; a proportion must be positive"),
    ("data.optional_domains=[book]", "names book"),
    ("model.hidden_size=${x.y}", "Interpolation key 'x.y' not found"),
    ("run_folder=x/{nonsense}", "unknown placeholder 'nonsense'"),
    ("=3", "neither a YAML file nor an override"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_bad_overrides_name_key_and_remedy(files: list[str], override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(files, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 3", "unknown key 'sed' (did you mean 'seed'?)"),
        ("a: [1", "broken YAML at line"),
        ("- 1", "no mapping"),
        ("seed: [1]", "seed"),
        ("mohd: {ffn: {sub_dims: 7}}", "mohd.ffn.sub_dims is 7"),
    ],
)
def test_bad_files_are_named(files: list[str], tmp_path: Path, text: str, message: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([*files, str(bad)])
    assert str(caught.value).startswith(str(bad))
    assert message in str(caught.value)


def test_missing_values_and_files(files: list[str]) -> None:
    with pytest.raises(UserError, match=r"no value for model\.head_dim.*configs/model"):
        load_config(files[:1])
    with pytest.raises(UserError, match=r"nothing\.yaml: no such config file"):
        load_config(["nothing.yaml"])


def test_every_shipped_model_and_setting_composes(root: Path) -> None:
    names = set()
    for model in sorted((root / "configs/model").glob("*.yaml")):
        for mohd in sorted((root / "configs/mohd").glob("*.yaml")):
            plan = load_model_plan([str(model), str(mohd)])
            assert plan.name == f"{model.stem}-{mohd.stem}"
            assert ModelPlan.from_dict(plan.to_dict()) == plan
            names.add(plan.name)
    assert len(names) == 5 * 8


def test_table_3_shares(root: Path) -> None:
    shares = {"50": 1 / 2, "75": 3 / 4, "25": 1 / 4, "100": 1, "x2": 1 / 2, "x3": 1 / 3, "x4": 1 / 4}
    for setting, share in shares.items():
        plan = load_model_plan([str(root / "configs/model/355m.yaml"), str(root / f"configs/mohd/{setting}.yaml")])
        for part in plan.components:
            assert part.top_k / part.sub_dims == share
            assert part.shared / part.top_k == 3 / 4


def test_plans_differ_by_name_of_the_field() -> None:
    plan = ModelPlan("a", 8, 8, 8, 1, 1, 1, 8, 10, 16, 1e4, 1e-5, 0.02)
    other = dataclasses.replace(plan, name="b", hidden_size=16)
    assert plan.differences(other) == ["hidden_size: 8 here, 16 there"]
    assert plan.differences(dataclasses.replace(plan, name="b")) == []
    with pytest.raises(UserError, match="not the plan of a MoHD model"):
        ModelPlan.from_dict({"name": "x"})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.one_of(st.text(max_size=60), st.tuples(st.sampled_from(sorted(KNOWN_KEYS)), st.text(max_size=30)).map("=".join))
)
def test_no_override_ever_breaks_with_a_traceback(override: str) -> None:
    root = Path(__file__).resolve().parents[2]
    base = [str(root / "configs/model/tiny.yaml"), str(root / "configs/mohd/x2.yaml")]
    try:
        load_config(
            base, ["data.local=x", "data.domains={a: 1}", "max_duration=1ba", "global_train_batch_size=1", override]
        )
    except UserError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_no_file_ever_breaks_with_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(content)
    try:
        load_config([str(file)])
    except UserError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("${seed}"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(key=st.sampled_from(sorted(KNOWN_KEYS)), value=VALUES)
def test_no_value_ever_breaks_with_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    """Any YAML value for any key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    file, root = tmp_path_factory.getbasetemp() / "value.yaml", Path(__file__).resolve().parents[2]
    file.write_text(yaml.safe_dump(value))
    line = ""
    try:
        load_config([str(root / "configs/model/tiny.yaml"), str(root / "configs/mohd/x2.yaml"), str(file)])
    except UserError as error:
        line = str(error)
    assert "\n" not in line


def test_a_value_that_was_renamed_is_read_and_the_same_run(files: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """``sum_preserving`` of an earlier version, in a config and in a run's record."""
    old, new = load_config(files, ["mohd.scaling=sum_preserving"]), load_config(files)
    assert "sum_preserving is now called sum_to_active" in caplog.text
    assert old.mohd.scaling == new.mohd.scaling == "sum_to_active"
    record = dataclasses.asdict(new)
    record["mohd"]["scaling"] = "sum_preserving"
    for key in ("router_input", "router_init_std", "balance_count", "balance_scores"):  # not known to that version
        del record["mohd"][key]
    assert config_differences(record, dataclasses.asdict(new)) == []
    other = load_config(files, ["mohd.balance_count=highest"])
    assert config_differences(record, dataclasses.asdict(other)) == ["mohd.balance_count: selected there, highest here"]
