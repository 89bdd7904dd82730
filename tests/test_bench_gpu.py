"""The benchmark of one GPU, at toy size on a CPU."""

import json

import pytest
import torch

from dev.bench import gpu


@pytest.mark.slow
def test_all_sections_run_without_a_gpu(tmp_path):
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    sections = ("ceilings", "attention", "step", "float8", "training", "loader", "engine")
    assert all(isinstance(results[name], dict) and results[name] for name in sections)


def test_a_failing_section_is_reported_and_the_others_run(monkeypatch, capsys):
    def loader(args, device, dtype):
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "loader", loader)
    with pytest.raises(SystemExit, match="failed: loader"):
        gpu.main(["--device", "cpu", "--tiny", "--only", "loader", "--only", "ceilings"])
    out = capsys.readouterr().out
    assert "FAILED: ValueError: no such kernel" in out and "copy GB/s" in out


def test_errors_are_relative_and_nan_never_passes():
    assert gpu.error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.2 / 5**0.5)
    with pytest.raises(AssertionError):
        gpu.require(float("nan"), 1.0)
