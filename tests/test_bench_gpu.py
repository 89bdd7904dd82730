"""The bench for one GPU, every line of it at toy size on a CPU."""

import json

import pytest

from dev.bench import gpu


@pytest.mark.slow
def test_all_sections_run_without_a_gpu(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    sections = {name: found for name, found in results.items() if name.startswith(("check ", "measure "))}
    assert len(sections) == 10 and all(isinstance(found, dict) and found for found in sections.values())
    assert results["measure race"]["bits per byte"] < 8 and "measure training" in capsys.readouterr().out


def test_a_section_that_fails_is_told_of_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    def broken(args, device, dtype):
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "check_attention", broken)
    broken.__name__ = "check_attention"
    with pytest.raises(SystemExit, match="failed: check attention"):
        gpu.main(["--device", "cpu", "--tiny", "--only", "check attention", "--only", "ceilings", "--out", str(tmp_path / "gpu.json")])
    out = capsys.readouterr().out
    assert "FAILED: ValueError: no such kernel" in out and "copy GB/s" in out


def test_errors_are_relative_and_nan_never_passes():
    import torch

    assert gpu.error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.2 / 5**0.5)
    with pytest.raises(AssertionError):
        gpu.require(float("nan"), 1.0)


def test_exact_attention_is_attention():
    import torch
    import torch.nn.functional as F

    q, k, v = (torch.randn(2, 12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(gpu.exact_attention(q, k, v, -1), expected)
    one = gpu.exact_attention(q, k, v, 0)  # a window of none before itself: its own value
    assert torch.allclose(one, v.repeat_interleave(2, dim=2))
