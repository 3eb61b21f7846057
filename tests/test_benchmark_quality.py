"""What quantisation does to texts, measured and told."""

from __future__ import annotations

import json

import pytest
import torch
from benchmark_results import ORIGIN, report_on

from benchmarks import (
    quality,
)
from benchmarks.__main__ import main
from benchmarks.record import merged


def test_quality_and_its_tables(committed, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "WINDOW", 64)
    file = tmp_path / "quality.json"
    assert main(["quality", "--quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    found = quality.summary(merged(result)["draws"])
    contenders = {who["name"]: who for who in found["contenders"]}
    assert list(contenders) == list(quality.CONTENDERS)
    assert contenders["int4"]["bits_per_weight"] == pytest.approx(4.588, abs=1e-3)
    assert contenders["int8"]["kl_nats"]["mean"] < contenders["int4"]["kl_nats"]["mean"]
    result["provenance"] = ORIGIN
    (committed / "results" / "cpu" / "quality.json").write_text(json.dumps(result))
    assert report_on(committed) == 0
    text = (committed / "results" / "README.md").read_text()
    assert "| int4 | 4.59 | " in text and "| Laplace | " in text


def test_share_and_interval():
    theirs = torch.tensor([0.01, 0.02, 0.03, 0.02], dtype=torch.float64)
    half = quality.share(theirs / 2, theirs)
    assert half["low"] <= half["mean"] <= half["high"]
    assert half["mean"] == pytest.approx(0.5, rel=0.01) and half["high"] - half["low"] < 0.01
    found = quality.plain_interval(torch.arange(10, dtype=torch.float64))
    assert found["mean"] == 4.5 and found["half"] == pytest.approx(
        2.2622 * 3.0277 / 10**0.5, rel=0.01
    )
