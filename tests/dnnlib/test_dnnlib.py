"""dnnlib: command lines that fail in one line, durable files, logs, downloads."""

import copy
import gc
import os
import pickle
import resource
import sys

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import dnnlib
from dnnlib import cli


def test_easy_dict_is_a_dict_with_attributes():
    d = dnnlib.EasyDict(a=1)
    d.b = 2
    del d.a
    assert d == {"b": 2} and d.b == 2
    assert copy.deepcopy(d) == pickle.loads(pickle.dumps(d)) == d
    with pytest.raises(AttributeError):
        _ = d.a


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (11.6, "12s"), (59.6, "1m 00s"), (185, "3m 05s"), (3723, "1h 02m 03s"), (86400 + 7380, "1d 02h 03m")],
)
def test_format_time(seconds, text):
    assert dnnlib.format_time(seconds) == text


def test_error_messages_are_one_printable_line():
    assert dnnlib.UserError("a\n  b\r\nc\x1b[31m").format_message() == "a b c?[31m"
    assert dnnlib.UserError("").exit_code == 1


# ---- option types


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 20)), min_size=1))
def test_int_list_round_trip(ranges):
    text = ",".join(f"{a}-{a + n}" if n else f"{a}" for a, n in ranges)
    assert cli.parse_int_list(text) == [i for a, n in ranges for i in range(a, a + n + 1)]


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "-3", "1-", "5-1", "1.5", "0-999999999999", "1 2", "٣"])
def test_int_list_refuses(text):
    with pytest.raises(ValueError, match=r"\S"):
        cli.parse_int_list(text)


@click.command(cls=cli.Command, epilog="Examples:\n  python x.py --lr_rampup=1 \\\n      --data=a.zip")
@click.option("--lr_rampup", type=cli.FloatRange(min=0), default=1.5, help="Ramp-up")
@click.option("--max-images", type=int, help="Images")
@click.option("--data", required=True, help="Archive")
@click.option("--cond", type=cli.BOOL, default=False)
@click.option("--seeds", type=cli.INT_LIST, default="0-2")
@click.option("--s_max", type=cli.FloatRange(finite=False), default=float("inf"))
@click.option("--mode", type=click.Choice(["one_way", "other"]), default="one_way")
@click.pass_context
def command(ctx, data, **options):
    """Does it."""
    if data == "options":
        print(sorted(options.items()))
        return "a result"
    if data == "exit":
        ctx.exit(3)
    raise {
        "user": dnnlib.UserError("x.zip: not a ZIP\nat all"),
        "usage": click.UsageError("--class=7: there are 3"),
        "file": FileNotFoundError(2, "No such file or directory", "x.zip"),
        "full": OSError(28, "No space left"),
        "memory": MemoryError(),
        "tensor": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        "gpu": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "ctrl-c": KeyboardInterrupt(),
        "bug": ZeroDivisionError("bug"),
        "eof": EOFError("a bug as well"),
    }[data]


def run(*args, **kwargs):
    return CliRunner().invoke(command, args, **kwargs)


def fails(exit_code, *args):
    result = run(*args)
    assert result.exit_code == exit_code and result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr[7:-1]


@pytest.mark.parametrize("rampup", ["--lr_rampup", "--lr-rampup"])
@pytest.mark.parametrize("images", ["--max_images", "--max-images"])
def test_dashes_and_underscores_are_interchangeable(rampup, images):
    result = run(rampup, "2", f"{images}=5", "--data=options", "--cond=YES", "--seeds=4,6-7", "--mode=one-way")
    assert result.exit_code == 0, result.output
    assert result.output == (
        "[('cond', True), ('lr_rampup', 2.0), ('max_images', 5), ('mode', 'one_way'), "
        "('s_max', inf), ('seeds', [4, 6, 7])]\n"
    )


@pytest.mark.parametrize(
    "args, exit_code, message",
    [
        (["--data=user"], 1, "x.zip: not a ZIP at all"),
        (["--data=usage"], 2, "--class=7: there are 3"),
        (["--data=file"], 1, "x.zip: No such file or directory"),
        (["--data=full"], 1, "No space left"),
        (["--data=memory"], 1, "not enough memory for this; smaller batches or images need less"),
        (["--data=gpu"], 1, "not enough memory for this; smaller batches or images need less"),
        (["--data=tensor"], 1, "not enough memory for this; smaller batches or images need less"),
        (["--data=ctrl-c"], 130, "interrupted"),
        ([], 2, "Missing option '--data'."),
        (["--data=exit", "--max-images=x"], 2, "Invalid value for '--max-images': 'x' is not a valid integer."),
        (["--data=exit", "--cond=2"], 2, "Invalid value for '--cond': '2' is none of 0, 1, false, true, no, yes"),
        (["--data=exit", "--seeds=5-1"], 2, "Invalid value for '--seeds': '5-1' runs downwards; write 1-5"),
        (["--data=exit", "--lr_rampup=nan"], 2, "Invalid value for '--lr_rampup': 'nan' is not a finite number"),
        (["--data=exit", "--lr_rampup=inf"], 2, "Invalid value for '--lr_rampup': 'inf' is not a finite number"),
    ],
)
def test_failures_are_one_line(args, exit_code, message):
    assert fails(exit_code, *args) == message


def test_blame_puts_the_option_before_the_message():
    with click.Context(click.Command("any")), pytest.raises(dnnlib.UserError) as e:
        with cli.blame("--cls"), cli.blame("--network"):
            raise dnnlib.UserError("a.pkl: corrupt")
    assert e.value.format_message() == "--cls: --network: a.pkl: corrupt" and e.value.exit_code == 1
    with pytest.raises(click.UsageError, match="^no option"), cli.blame("--cls"):
        raise click.UsageError("no option")
    with pytest.raises(dnnlib.UserError) as e, cli.blame("--cls"):  # in Python, where there are no options
        raise dnnlib.UserError("a.pkl: corrupt")
    assert e.value.format_message() == "a.pkl: corrupt"


def test_unknown_option_is_named():
    assert "--foo-bar" in fails(2, "--data=exit", "--foo-bar=1")


def test_only_rank_0_reports(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = run("--data=user")
    assert result.exit_code == 1 and result.output == ""


def test_status_of_exit_and_help():
    assert run("--data=exit").exit_code == 3
    result = run("--help")
    assert result.exit_code == 0
    assert "--lr_rampup" in result.output and "[default: 1.5; x>=0]" in result.output
    assert "Examples:\n  python x.py --lr_rampup=1 \\\n      --data=a.zip\n" in result.output


def test_bugs_keep_their_traceback():
    assert isinstance(run("--data=bug").exception, ZeroDivisionError)
    assert isinstance(run("--data=eof").exception, RuntimeError)


def test_called_from_a_program_errors_and_results_pass_through():
    assert command.main(["--data=options"], standalone_mode=False) == "a result"
    with pytest.raises(dnnlib.UserError):
        command.main(["--data=user"], standalone_mode=False)
    with pytest.raises(click.Abort):
        command.main(["--data=ctrl-c"], standalone_mode=False)
    assert run("--data=options").exit_code == 0  # the callback's return value does not become the exit code


def test_group():
    @click.group(cls=cli.Group)
    def group():
        pass

    @group.command(name="calc-it")
    @click.option("--num_images", type=int, required=True)
    def calc(num_images):
        print(num_images)

    runner = CliRunner()
    assert runner.invoke(group, ["calc_it", "--num-images=3"]).stdout == "3\n"
    for args, message in [
        ([], "Missing command; there are: calc-it."),
        (["cal"], "No such command 'cal'"),
        (["calc_it"], "Missing option '--num_images'."),
    ]:
        result = runner.invoke(group, args)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {message}") and result.stderr.count("\n") == 1
    assert runner.invoke(group, ["--help"]).exit_code == 0


# ---- files


def test_logger_tees_and_appends(tmp_path, capsys):
    log = tmp_path / "log.txt"
    with dnnlib.Logger(log):
        print("one")
        assert log.read_text() == "one\n"  # each line is written at once
    with dnnlib.Logger(log, mode="a") as logger:
        print("two", end="")
        assert logger.isatty() is False
    logger.close()
    with dnnlib.Logger(None):
        print("three")
    assert log.read_text() == "one\ntwo" and capsys.readouterr().out == "one\ntwothree\n"
    assert not isinstance(sys.stdout, dnnlib.Logger)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_refuses_the_log_ends_the_copying_only(capsys):
    with dnnlib.Logger("/dev/full"):
        print("one")
        print("two")
    out = capsys.readouterr().out
    assert out.startswith("one\n") and out.endswith("two\n") and out.count("Warning: /dev/full: No space left") == 1
    assert not isinstance(sys.stdout, dnnlib.Logger)


@pytest.fixture
def small_disk():
    """Writes fail after 64 KiB per file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_atomic_open_replaces_whole_files_only(tmp_path, small_disk):
    path = tmp_path / "a.json"
    with dnnlib.atomic_open(path, "wt") as file:
        file.write("é")
        assert os.listdir(tmp_path) != ["a.json"]
    assert path.read_text(encoding="utf-8") == "é"
    with pytest.raises(KeyboardInterrupt), dnnlib.atomic_open(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(OSError) as e, dnnlib.atomic_open(path) as file:
        file.write(bytes(1 << 17))
    assert e.value.filename == str(path) and e.value.strerror
    with pytest.raises(FileNotFoundError) as e, dnnlib.atomic_open(tmp_path / "no" / "a"):
        pass
    assert e.value.filename == str(tmp_path / "no" / "a")
    assert path.read_text(encoding="utf-8") == "é" and os.listdir(tmp_path) == ["a.json"]


def test_atomic_open_syncs_data_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    with dnnlib.atomic_open(tmp_path / "a") as file:
        file.write(b"x")
    assert calls == ["fsync", "replace", "fsync"]


def test_read_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert dnnlib.read_bytes(tmp_path / "a") == dnnlib.read_bytes(str(tmp_path / "a")) == b"x"
    for bad in (tmp_path / "b", tmp_path, "a\0b"):
        with pytest.raises(dnnlib.UserError):
            dnnlib.read_bytes(bad)


def test_no_garbage_ends_with_its_block():
    with pytest.raises(KeyError), dnnlib.no_garbage():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with dnnlib.no_garbage():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
