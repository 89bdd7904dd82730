"""The benchmark of one GPU, at toy size on a CPU."""

import json

import pytest

from dev.bench import gpu


@pytest.mark.slow
def test_all_sections_run_without_a_gpu(tmp_path):
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert all(results[name] for name in gpu.SECTIONS)


def test_a_failing_section_is_reported_and_the_others_run(monkeypatch, capsys):
    def broken(args, device, dtype):
        return {"error": gpu.require(float("nan"), 1.0)}

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": broken, "ceilings": gpu.ceilings})
    with pytest.raises(SystemExit, match="failed: broken"):
        gpu.main(["--device", "cpu", "--tiny"])
    out = capsys.readouterr().out
    assert "AssertionError: an error of nan, more than 1" in out and "copy GB/s" in out
