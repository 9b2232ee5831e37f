"""dnnlib: command lines that fail in one line, durable files, logs, downloads."""

import copy
import http.server
import os
import pickle
import resource
import sys
import threading

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


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (11.6, "12s"), (59.6, "1m 00s"), (185, "3m 05s"), (3723, "1h 02m 03s"), (86400 + 7380, "1d 02h 03m")])
def test_format_time(seconds, text):
    assert dnnlib.format_time(seconds) == text


def test_error_messages_are_one_printable_line():
    assert dnnlib.UserError("a\n  b\r\nc\x1b[31m").format_message() == "a b c?[31m"
    assert dnnlib.UserError("").exit_code == 1


# ---- option types

@given(st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 20)), min_size=1))
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
        "user": dnnlib.UserError("x.zip: not a ZIP\nat all"), "usage": click.UsageError("--class=7: there are 3"),
        "file": FileNotFoundError(2, "No such file or directory", "x.zip"), "full": OSError(28, "No space left"),
        "ctrl-c": KeyboardInterrupt(), "bug": ZeroDivisionError("bug"), "eof": EOFError("a bug as well"),
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
    assert result.output == ("[('cond', True), ('lr_rampup', 2.0), ('max_images', 5), ('mode', 'one_way'), "
                             "('s_max', inf), ('seeds', [4, 6, 7])]\n")


@pytest.mark.parametrize("args, exit_code, message", [
    (["--data=user"], 1, "x.zip: not a ZIP at all"),
    (["--data=usage"], 2, "--class=7: there are 3"),
    (["--data=file"], 1, "x.zip: No such file or directory"),
    (["--data=full"], 1, "No space left"),
    (["--data=ctrl-c"], 130, "interrupted"),
    ([], 2, "Missing option '--data'."),
    (["--data=exit", "--max-images=x"], 2, "Invalid value for '--max-images': 'x' is not a valid integer."),
    (["--data=exit", "--cond=2"], 2, "Invalid value for '--cond': '2' is none of 0, 1, false, true, no, yes"),
    (["--data=exit", "--seeds=5-1"], 2, "Invalid value for '--seeds': '5-1' runs downwards; write 1-5"),
    (["--data=exit", "--lr_rampup=nan"], 2, "Invalid value for '--lr_rampup': 'nan' is not a finite number"),
    (["--data=exit", "--lr_rampup=inf"], 2, "Invalid value for '--lr_rampup': 'inf' is not a finite number"),
])
def test_failures_are_one_line(args, exit_code, message):
    assert fails(exit_code, *args) == message


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
    assert run("--data=options").exit_code == 0  # whatever the callback returns


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
    for args, message in [([], "Missing command; there are: calc-it."),
                          (["cal"], "No such command 'cal'"), (["calc_it"], "Missing option '--num_images'.")]:
        result = runner.invoke(group, args)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {message}") and result.stderr.count("\n") == 1
    assert runner.invoke(group, ["--help"]).exit_code == 0


# ---- files

def test_logger_tees_and_appends(tmp_path, capsys):
    log = tmp_path / "log.txt"
    with dnnlib.Logger(log):
        print("one")
        assert log.read_text() == "one\n"  # a line is there at once
    with dnnlib.Logger(log, mode="a") as logger:
        print("two", end="")
        assert logger.isatty() is False
    logger.close()
    with dnnlib.Logger(None):
        print("three")
    assert log.read_text() == "one\ntwo" and capsys.readouterr().out == "one\ntwothree\n"
    assert not isinstance(sys.stdout, dnnlib.Logger)


@pytest.fixture
def small_disk():
    """Writes fail after 64 KiB a file."""
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


# ---- downloads

class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/good.pkl":
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "400")
            self.end_headers()
            self.wfile.write(b"data")
        elif self.path == "/missing":
            self.send_error(404)
        else:
            target = {"/to-good": "/good.pkl", "/to-file": "file:///etc/passwd"}.get(self.path, "/loop")
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def test_download_is_cached(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        with dnnlib.open_url(f"{server.url}/to-good", allow_http=True, verbose=False) as file:
            assert file.read() == b"data"
    assert server.asked == ["/to-good", "/good.pkl"]


@pytest.mark.parametrize("page, reason", [
    ("missing", "404"), ("cut", "4 bytes read"), ("loop", "more than 10 redirects"), ("to-file", "https")])
def test_failed_downloads_leave_nothing(server, tmp_path, page, reason):
    with pytest.raises(dnnlib.UserError, match=reason) as e:
        dnnlib.open_url(f"{server.url}/{page}", tmp_path, verbose=False, allow_http=True)
    assert f"{server.url}/{page}" in e.value.message and str(tmp_path) in e.value.message
    assert os.listdir(tmp_path) == []


def test_plain_http_is_refused_unless_allowed(server, tmp_path):
    with pytest.raises(dnnlib.UserError, match="only https"):
        dnnlib.open_url(f"{server.url}/good.pkl", tmp_path, verbose=False)
    assert server.asked == []
    with pytest.raises(dnnlib.UserError, match="not a URL"):
        dnnlib.open_url("good.pkl", tmp_path)
