"""Loggers and callbacks by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor

from mohd_train.errors import UserError
from mohd_train.train import registry


def test_unknown_names_and_arguments_are_refused() -> None:
    with pytest.raises(UserError, match=r"loggers: unknown name 'wand' \(did you mean 'wandb'\?\)"):
        registry.check_loggers({"wand": {}})
    with pytest.raises(
        UserError, match=r"callbacks.speed_monitor: unknown keyword argument 'windowsize' .*window_size"
    ):
        registry.check_callbacks({"speed_monitor": {"windowsize": 3}})
    with pytest.raises(UserError, match=r"callbacks.lr_monitor is 3; it must be a mapping"):
        registry.check_callbacks({"lr_monitor": 3})
    with pytest.raises(UserError, match=r"callbacks.speed_monitor: Invalid time_unit"):
        registry.build_callbacks({"speed_monitor": {"time_unit": "years"}})


def test_defaults_can_be_changed_and_left_out() -> None:
    assert [type(callback) for callback in registry.build_callbacks({})] == [SpeedMonitor, LRMonitor]
    found = registry.build_callbacks({"lr_monitor": None, "speed_monitor": {"window_size": 3}, "memory_monitor": {}})
    assert [type(callback) for callback in found] == [SpeedMonitor, MemoryMonitor]
    assert found[0].history_wct.maxlen == 4


def test_every_known_name_is_composers() -> None:
    for kind in [*registry.LOGGERS.values(), *registry.CALLBACKS.values()]:
        assert any(parent.__module__.startswith("composer.") for parent in kind.__mro__)


def test_wandb_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert registry.wandb_is_offline()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-a-real-key\n")
    assert not registry.wandb_is_offline()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert registry.wandb_is_offline()


def test_loggers_write_into_the_run_folder(tmp_path: Path) -> None:
    wandb, tensorboard = registry.build_loggers({"wandb": {"project": "p"}, "tensorboard": {}}, tmp_path, "id-of-run")
    assert wandb._init_kwargs["id"] == "id-of-run"
    assert wandb._init_kwargs["resume"] == "allow"
    assert wandb._init_kwargs["dir"] == str(tmp_path)
    assert tensorboard.log_dir == str(tmp_path / "tensorboard")
