"""The commands of the TDSM paper's README, as they are typed, on a synthetic archive of CIFAR-10's layout."""

import importlib
import json
import os
import shlex
import subprocess
import sys

from click.testing import CliRunner

from tests.support.paths import ROOT
from tests.support.synth import make_cifar10

SHORT = "--duration=0.000001 --cbase=8 --cres=1,1 --batch=64"  # the last one counts


def test_tdsm_pipeline_as_published(tmp_path, monkeypatch):
    """The training on two processes really is; the other scripts run in this one, which need not start anew."""
    monkeypatch.chdir(tmp_path)
    make_cifar10(tmp_path / "downloads" / "cifar10" / "cifar-10-python.tar.gz")
    for script in ROOT.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)

    def type_in(line):
        args = shlex.split(line)
        if "train_noise.py" not in args:
            at = next(i for i, arg in enumerate(args) if arg.endswith(".py"))
            result = CliRunner().invoke(importlib.import_module(args[at][:-3]).main, args[at + 1 :])
            assert result.exit_code == 0, result.output + repr(result.exception)
            return
        if args[0] == "torchrun":
            args[:1] = [sys.executable, "-m", "torch.distributed.run"]
        args[0] = sys.executable
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(args, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    type_in(
        "python dataset_tool.py --source=downloads/cifar10/cifar-10-python.tar.gz "
        "--dest=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4"
    )
    type_in(
        "torchrun --standalone --nproc_per_node=1 train_classifier.py --outdir=classifier-runs "
        f"--data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp --batch 1024 {SHORT}"
    )
    cls = next((tmp_path / "classifier-runs").iterdir()).relative_to(tmp_path)
    type_in(
        "torchrun --standalone --nproc_per_node=2 train_noise.py --outdir=noise-runs "
        "--data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp "
        f"--cls={cls}/network-snapshot-*.pkl --noise_type=sym --noise_rate=0.4 --batch=64 {SHORT}"
    )
    run = next((tmp_path / "noise-runs").iterdir())
    assert run.name == "00000-cifar10_sym_40-32x32-cond-ddpmpp-edm-gpus2-batch64-fp32"
    network = next(run.glob("network-snapshot-*.pkl")).relative_to(tmp_path)
    type_in(f"python generate.py --seeds=0-3 --steps=18 --class=0 --outdir=zeros --network={network}")
    type_in(
        "torchrun --standalone --nproc_per_node=2 generate.py --outdir=out --seeds=0-6 --batch=64 --steps=2 "
        f"--network={network}"
    )
    labels = json.loads((tmp_path / "zeros" / "dataset.json").read_text())
    assert [label for _, label in labels["labels"]] == [0] * 4 and labels["class_names"][0] == "airplane"
    assert len(list((tmp_path / "out").glob("*.png"))) == 7
