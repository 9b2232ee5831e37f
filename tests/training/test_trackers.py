"""TensorBoard and Weights & Biases: what they are shown, and that they never cost a run."""

import json
import os
import sys
import types

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import train_noise
from tests.support.runs import TINY
from tests.support.synth import make_archive, pictures
from training import trackers
from training.trackers import Trackers, check_wandb, transition_picture

KEY = "0123456789abcdef" * 2 + "01234567"


class Fake:
    """Both packages: they note down what they are given."""

    def __init__(self, monkeypatch):
        self.events, self.inits, self.purged, self.texts, self.hparams, self.closed = [], [], [], {}, None, 0
        self.logins, self.fails = [], {}
        fake = self

        class SummaryWriter:
            def __init__(self, folder, purge_step=None):
                fake.folder, self.file_writer = folder, types.SimpleNamespace(add_summary=lambda _: None)
                fake.purged.append(purge_step)

            def add_scalar(self, name, value, step):
                fake.events.append(("tensorboard", name, float(value), step))

            def add_image(self, name, image, step, dataformats):
                assert dataformats == "HWC" and image.dtype == np.uint8 and image.shape[2] == 3
                fake.events.append(("tensorboard", name, image, step))

            def add_text(self, name, text, step):
                fake.texts[name] = text

            def flush(self):
                pass

            def close(self):
                fake.closed += 1

        class Run:
            id = "abc123"

            def log(self, values, step):
                fake.fail("log")
                fake.events += [("wandb", name, value, step) for name, value in values.items()]

            def finish(self):
                fake.closed += 1

        def init(**kwargs):
            fake.fail("init")
            fake.inits.append(kwargs)
            return Run()

        def login(verify, timeout, prompt):
            assert verify and not prompt
            fake.logins.append(os.environ.get("WANDB_API_KEY"))
            fake.fail("login")
            return fake.logins[-1] is not None

        def hparams(given, _metrics):
            fake.hparams = given
            return []

        modules = {
            "torch.utils.tensorboard": dict(SummaryWriter=SummaryWriter),
            "torch.utils.tensorboard.summary": dict(hparams=hparams),
            "wandb": dict(init=init, login=login, Image=np.asarray),
        }
        for name, content in modules.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setenv("WANDB_API_KEY", "")  # so that the end of the test takes away what the run sets
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.delenv("WANDB_MODE", raising=False)

    def fail(self, where):
        if where in self.fails:
            raise RuntimeError(self.fails[where])

    def values(self, tracker, name):
        return [(step, value) for who, what, value, step in self.events if (who, what) == (tracker, name)]


@pytest.fixture
def fake(monkeypatch):
    return Fake(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.zip"
    return make_archive(path, pictures(64, channels=1), [i % 2 for i in range(64)], class_names=["cat", "dog"])


def train(data, outdir, *args):
    own = ["--weights=class", "--noise_type=sym", "--noise_rate=0.2", "--cond=1", "--duration=0.000096", "--tick=0.032"]
    result = CliRunner().invoke(train_noise.main, [f"--data={data}", f"--outdir={outdir}", *TINY, *own, *args])
    return result.exit_code, result.output


def test_both_are_shown_everything(fake, data, tmp_path):
    code, output = train(data, tmp_path, "--tensorboard=1", "--wandb-project=noise", f"--wandb-api-key={KEY}")
    assert code == 0, output
    (run_dir,) = tmp_path.iterdir()
    assert fake.logins == [KEY] and fake.folder == str(run_dir) and fake.closed == 2
    (init,) = fake.inits
    assert init["project"] == "noise" and init["dir"] == str(run_dir) and init["name"] == run_dir.name
    assert init["config"]["tdsm"]["weights"] == "class" and init["id"] is None and init["mode"] is None
    assert fake.hparams["optimizer.lr"] == 1e-3 and fake.hparams["tdsm.noise_rate"] == 0.2
    assert '"noise_rate": 0.2' in fake.texts["options"]
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    means = [(round(row["Progress/kimg"]["mean"] * 1000), row["Loss/loss"]["mean"]) for row in rows]
    with Image.open(run_dir / "samples-000000.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    for tracker in ("tensorboard", "wandb"):
        assert fake.values(tracker, "Loss/loss") == means
        steps = [step for step, _ in fake.values(tracker, "samples")]
        assert steps == [64, 96] and np.array_equal(fake.values(tracker, "samples")[-1][1], sheet)
        assert [step for step, _ in fake.values(tracker, "transition")] == [32, 64, 96]
    for file in run_dir.iterdir():
        assert KEY.encode() not in file.read_bytes(), f"{file.name} holds the key"
    assert KEY not in output

    # A continued run goes on with its run there, and replaces what TensorBoard has beyond its state.
    again = ["--tensorboard=1", "--wandb=noise", "--wandb-mode=offline", f"--resume={run_dir}", "--duration=0.000128"]
    assert train(data, tmp_path, *again)[0] == 0
    assert fake.logins == [KEY]  # offline asks nobody
    assert fake.purged == [None, 97]  # from here on: the tick at 96 is in the state, and is not reported again
    assert [step for step, _ in fake.values("tensorboard", "Loss/loss")] == [32, 64, 96, 128]
    assert {name: fake.inits[1][name] for name in ("id", "resume", "mode")} == dict(
        id="abc123", resume="allow", mode="offline"
    )
    assert train(data, tmp_path, *again[:2], "--wandb-resume=other", "-n")[0] == 0 and len(fake.inits) == 2


def test_a_named_run_must_exist(fake, data, tmp_path):
    assert train(data, tmp_path, "--wandb=noise", "--wandb-mode=offline", "--wandb-resume=xyz")[0] == 0
    assert (fake.inits[0]["id"], fake.inits[0]["resume"]) == ("xyz", "must")


def test_who_is_not_let_in_learns_it_before_there_is_a_run(fake, data, tmp_path):
    for setting, message in [
        (None, "there is no API key"),
        ("Unable to connect to wandb\nretrying", "Unable to connect to wandb retrying"),
    ]:
        fake.fails = {} if setting is None else dict(login=setting)
        code, output = train(data, tmp_path / "out", "--wandb=noise")
        assert code == 1 and not (tmp_path / "out").exists(), output
        lines = [line for line in output.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1 and message in lines[0] and lines[0].startswith("Error: --wandb: "), output
        assert "WANDB_MODE=offline" in lines[0]
    for args in (["--wandb-mode=offline"], ["--wandb-resume=a"], ["--wandb-api-key=a"]):
        code, output = train(data, tmp_path / "out", *args)
        assert code == 2 and f"{args[0].split('=')[0]} goes with --wandb=PROJECT" in output, output


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_tracker_that_fails_costs_no_run(fake, data, tmp_path, where):
    fake.fails = {where: "the service is gone\nreally"}
    code, output = train(data, tmp_path, "--wandb=noise", "--wandb-mode=offline", "--tensorboard=1")
    assert code == 0, output
    assert output.count("Warning: WandB failed and gets nothing more: the service is gone really") == 1
    assert len(fake.values("tensorboard", "Loss/loss")) == 3  # the other one goes on
    assert not [event for event in fake.events if event[0] == "wandb"]


def test_offline_by_the_environment_asks_nobody(fake, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(None, None)
    assert fake.logins == []
    check_wandb("online", KEY)
    assert fake.logins == [KEY]


def test_older_versions_know_no_prompt(fake, monkeypatch):
    monkeypatch.setattr(sys.modules["wandb"], "login", lambda verify, timeout: True)
    check_wandb("online", KEY)


def test_picture_of_a_transition():
    T = np.array([[0.9, 0.1], [0.0, 1.0]])
    picture = transition_picture(T, ["a class with a very long name", "b"])
    assert picture.dtype == np.uint8 and picture.ndim == 3
    side = trackers.CELL
    corners = picture[side + 2 :: side, -2 * side + 2 :: side].astype(int).sum(axis=2)  # a corner of each entry
    assert corners[1, 0] == 3 * 255 and corners[1, 1] < corners[0, 0] < corners[0, 1] < corners[1, 0]
    assert transition_picture(np.eye(1000)).shape == (1000, 1000, 3)
    assert transition_picture(np.full([3, 3], np.nan)).shape[2] == 3


def test_real_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.support.objectives import make_config

    shown = Trackers(make_config(tensorboard=True), str(tmp_path))
    shown.scalars({"Loss/loss": 0.5}, 32)
    shown.snapshot(dict(transition=np.eye(2).tolist()), None, 32)
    shown.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Scalars("Loss/loss")[0].value == 0.5 and found.Images("transition")[0].step == 32

    shown = Trackers(make_config(tensorboard=True), str(tmp_path), 32)
    shown.scalars({"Loss/loss": 0.25}, 64)
    shown.close()
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("Loss/loss")] == [32, 64]


def test_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from tests.support.objectives import make_config

    monkeypatch.setenv("WANDB_SILENT", "true")
    shown = Trackers(make_config(wandb="project", wandb_mode="offline"), str(tmp_path))
    shown.scalars({"Loss/loss": 0.5}, 32)
    shown.snapshot(dict(transition=np.eye(2).tolist()), None, 32)
    assert shown._trackers
    shown.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")) and (tmp_path / "wandb-run-id.txt").read_text()
