"""Where networks for other programs are found. tests/scripts/test_export.py writes and reads them."""

import json
import os

import pytest
import safetensors.torch
import torch

import dnnlib
from torch_utils import portable

CONFIG = dict(format=portable.FORMAT, class_name="Net", init_args=[], init_kwargs={})


def files(folder):
    """Write a network's two files into a folder and return the path of the tensors."""
    folder.mkdir(parents=True)
    safetensors.torch.save_file({"w": torch.ones(2)}, folder / portable.WEIGHTS)
    (folder / portable.CONFIG).write_text(json.dumps(CONFIG))
    return folder / portable.WEIGHTS


def test_a_folder_may_have_any_name(tmp_path):
    path = str(files(tmp_path / "run #3?"))
    assert portable.is_portable(path)
    config, tensors = portable.read(path)
    assert config == CONFIG and tensors["w"].tolist() == [1, 1]


@pytest.mark.parametrize("end", ["", "?download=true", "#sha256=" + "0" * 64, "?path=a/b#sha256=" + "0" * 64])
def test_the_config_of_a_url_lies_beside_it(end, tmp_path, monkeypatch):
    path, asked = files(tmp_path / "there"), []

    def read_bytes(url):
        asked.append(url)
        return path.with_name(os.path.basename(url.partition("?")[0].partition("#")[0])).read_bytes()

    monkeypatch.setattr(dnnlib, "read_bytes", read_bytes)
    url = f"https://example.com/a/model.safetensors{end}"
    assert portable.is_portable(url) and not portable.is_portable(f"https://example.com/a.pkl{end}")
    assert portable.read(url)[0] == CONFIG
    assert asked == ["https://example.com/a/config.json", url]
