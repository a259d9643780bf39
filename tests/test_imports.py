"""Imports that Ctrl-C does not cut in two."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from pyro_ebm.imports import interruptions_wait, whole_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "cut_in_two.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nanswer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "cut_in_two"
    sys.modules.pop("cut_in_two", None)


def test_ctrl_c_comes_after_the_import(module):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        whole_import(module)
    assert sys.modules[module].answer == 42 and signal.getsignal(signal.SIGINT) is before
    assert whole_import(module).answer == 42


def test_without_ctrl_c_and_in_other_threads():
    found = []

    def work():
        with interruptions_wait():
            found.append(whole_import("json"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [sys.modules["json"]]
