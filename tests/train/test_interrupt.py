"""Ctrl-C. Importing Composer makes of it a SystemExit, which a run would record as a failure."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from composer.core.engine import sigterm_handler
from faults.faults_support import At, config_of, inject, record_of

from mohd_train.train.train import train


def test_an_interrupted_run_says_so(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, sigterm_handler)  # as Composer's import leaves it
    with monkeypatch.context() as patch:
        inject(patch, At("after_backward", 4, lambda _: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            train(config_of(tmp_path, data))
    assert record_of(tmp_path)["status"] == "interrupted"
    assert record_of(tmp_path)["error"] is None
