"""Where networks for other programs are found. tests/scripts/test_export.py writes and reads them."""

import hashlib
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
    query = end.partition("#")[0]
    assert asked == [url, f"https://example.com/a/config.json{query}"]


def test_a_hash_pins_the_config_too(tmp_path, monkeypatch):
    net = torch.nn.Linear(2, 2)
    net.init_args, net.init_kwargs, net.network_kind = [2, 2], {}, "denoiser"
    portable.write(tmp_path, net, dict(info={"T": [float("inf"), "é"]}))
    config, asked = tmp_path / portable.CONFIG, []

    def read_bytes(url):
        asked.append(url)
        return (tmp_path / os.path.basename(url.partition("#")[0])).read_bytes()

    monkeypatch.setattr(dnnlib, "read_bytes", read_bytes)
    url = "https://example.com/model.safetensors"
    for name in (f"{url}#sha256={'0' * 64}", url, str(tmp_path / portable.WEIGHTS)):
        assert portable.read(name)[0]["info"] == {"T": [float("inf"), "é"]}
    digest = hashlib.sha256(config.read_bytes()).hexdigest()
    beside = "https://example.com/config.json"
    assert asked[1::2] == [f"{beside}#sha256={digest}", beside, str(config)]
