"""Test the code of the rows about GPUs, on the CPU with tiny networks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_rows, steps
from benchmarks.core import Row
from benchmarks.roofline import Peaks, bound

TINY = ["--arch=ddpmpp_tiny", "--cbase=8", "--batch=4", "--batch-gpu=2", "--device=cpu"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return {script: [*args, f"--outdir={folder}"] for script, args in gpu_rows.prepare(str(folder), 32).items()}


@pytest.mark.parametrize("script", gpu_rows.STEPS)
def test_each_script_steps_in_both_forms(options, script):
    answers, facts = [], {}

    def turn(answer):
        answers.append(answer)
        return len(answers) < 3

    with pytest.raises(SystemExit):
        steps.ours(script, [*options[script], *TINY, "--precision=bf16"], turn)
    assert answers[0] is None and len(answers) == 3 and min(answers[1:]) > 0
    steps.plain(script, [*options[script], *TINY], lambda step, known: (step(), facts.update(known)))
    assert facts["flops"] > 0


def test_noise_of_type_pair_leaves_one_other_class(options):
    found = []
    steps.plain("train_noise", [*options["train_noise"], *TINY], lambda step, facts: found.append(step))
    objective = next(cell.cell_contents for cell in found[0].__closure__ if hasattr(cell.cell_contents, "trained"))
    observed = torch.arange(4)
    w = objective.weights(torch.randn(4, 3, 32, 32), torch.ones(4, 1, 1, 1), observed, None)
    assert (w > 0).sum(dim=1).tolist() == [2] * 4 and (w.gather(1, observed[:, None]) > 0).all()


def test_step_rows_are_eager_and_each_form_over_it(monkeypatch):
    asked = []

    def step_row(name, script, args, plain_args, batch, repeats, *, steps, precision):
        asked.append((script, args, plain_args))
        return Row(name, 1.0, 4.0, 8, 8, "note", batch, precision)

    monkeypatch.setattr(gpu_rows, "step_row", step_row)
    found = list(gpu_rows.step_rows("train", ["--batch=4"], 4, 5))
    assert [(row.precision, row.ours_seconds, row.plain_seconds) for row in found] == [
        ("fp32", 4.0, None),
        ("tf32", 1.0, 4.0),
        ("bf16", 1.0, 4.0),
        ("bf16", 1.0, 4.0),
    ]
    assert asked[2] == ("train", ["--batch=4", "--precision=bf16", "--compile=1"], ["--batch=4"])
    # The peak of its own precision limits each row.
    peaks = Peaks(dict(fp32=1, tf32=2, bf16=4), 8)
    assert [bound(row, peaks) for row in found] == [8, 4, 2, 2]


def test_sampling_rows(monkeypatch):
    compiled, dtypes = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    conv = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda *args, **kwargs: dtypes.append(out := conv(*args, **kwargs)) or out
    )
    found = list(gpu_rows.sampling_rows(torch.device("cpu"), 1, batch=2, steps=2, model_channels=8, channel_mult=[1]))
    assert [row.name for row in found] == [
        "sampling, eager float32",
        "sampling, tf32",
        "sampling, bf16",
        "sampling, bf16, compiled",
    ]
    assert [row.plain_seconds for row in found] == [None] + 3 * [found[0].ours_seconds]
    assert len(compiled) == 1 and {out.dtype for out in dtypes} == {torch.float32, torch.bfloat16}
    assert all(row.flops == 3 * gpu_work(compiled[0]) and row.images == 2 for row in found)


def gpu_work(net):
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(torch.zeros(2, 3, 32, 32), torch.ones(2))
    return flops.get_total_flops()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
def test_without_cuda_a_line_says_so(capsys):
    assert list(gpu_rows.rows(5)) == []
    assert "no CUDA device" in capsys.readouterr().out
