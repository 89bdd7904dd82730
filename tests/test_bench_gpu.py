"""The benchmark of one GPU, at toy size on a CPU."""

import json

import pytest

from dev.bench import gpu


@pytest.mark.slow
def test_all_sections_run_without_a_gpu(tmp_path):
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert all(isinstance(results[section.__name__], dict) for section in gpu.SECTIONS)


def test_a_failing_section_is_reported_and_the_others_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "bandwidth", lambda device: gpu.require(float("nan"), 1.0))
    with pytest.raises(SystemExit, match="failed: ceilings"):
        gpu.main(["--device", "cpu", "--tiny", "--only", "ceilings", "--only", "loader"])
    out = capsys.readouterr().out
    assert "FAILED: AssertionError: an error of nan, more than 1" in out and "tok/s" in out
