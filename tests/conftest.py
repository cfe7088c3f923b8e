"""All tests import the project from here, so that none of them has to say where it lies."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    # Many tests end a task that has learned nothing.
    config.addinivalue_line("filterwarnings", "ignore:task .* learned nothing")


@pytest.fixture
def no_figures(monkeypatch):
    """Runs of train_trace.py leave out tables and figures, which take longer than a short run."""
    monkeypatch.setattr("train_trace.write_report", lambda runs: None)
