import json

import click
import pytest

from sepdeploy import errors
from sepdeploy.cli import main

CODES = {
    "UsageError": 2,
    "UnsupportedModelError": 3,
    "ToolError": 4,
    "UntrustedFileError": 5,
    "ContractError": 70,
}


def test_every_error_class_has_its_documented_code():
    classes = {name: getattr(errors, name) for name in errors.__all__}
    base = classes.pop("SepdeployError")
    assert {name: kind.exit_code for name, kind in classes.items()} == CODES
    for name, kind in classes.items():
        assert issubclass(kind, base)
        line = next(line for line in errors.__doc__.splitlines() if f" {name} " in line)
        assert line.split(name)[1].split()[0] == str(CODES[name])


def run_raising(monkeypatch, error, *arguments) -> int:
    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def command(as_json):
        raise error

    monkeypatch.setattr(main.program, "get_command", lambda ctx, name: command)
    return main.run(["anything", *arguments])


@pytest.mark.parametrize("name", CODES)
def test_the_program_ends_with_the_code_and_the_sentence(monkeypatch, capsys, name):
    code = run_raising(monkeypatch, getattr(errors, name)("this is wrong; do that"))
    assert code == CODES[name]
    assert capsys.readouterr() == ("", "sepdeploy: this is wrong; do that\n")


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (ValueError("oops"), 70, "a bug in sepdeploy: ValueError: oops; run again with --debug"),
        (OSError(28, "No space left on device", "out/x"), 2, "cannot use out/x: No space left on device"),
        (MemoryError(), 2, "out of memory; use fewer --calibration-images"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory; use fewer"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "out of memory; use fewer"),
        (KeyboardInterrupt(), 130, "stopped; finished stages are kept"),
        (click.UsageError("--a belongs to --b"), 2, "--a belongs to --b"),
    ],
)
def test_other_errors(monkeypatch, capsys, error, code, part):
    assert run_raising(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert "Traceback" not in err


def test_a_network_is_not_blamed_for_a_lack_of_memory(monkeypatch, capsys):
    error = errors.UnsupportedModelError("the network runs on one image but not on 32")
    error.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert run_raising(monkeypatch, error) == 2
    expected = "sepdeploy: out of memory (the network runs on one image but not on 32); use fewer"
    assert expected in capsys.readouterr().err


def test_sentences_stay_on_one_line(monkeypatch, capsys):
    run_raising(monkeypatch, errors.UsageError("the user's code says: a\nb\r\n  c"))
    assert capsys.readouterr().err == "sepdeploy: the user's code says: a b c\n"


def test_debug_shows_the_traceback_and_what_the_tool_printed(monkeypatch, capsys):
    assert run_raising(monkeypatch, errors.ToolError("vela failed", stderr="line 7: bad op"), "--debug") == 4
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "line 7: bad op" in err
    assert run_raising(monkeypatch, errors.ToolError("vela failed", stderr="line 7: bad op")) == 4
    assert "line 7" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [errors.UnsupportedModelError("no"), click.BadParameter("no"), ValueError("no")])
def test_json_errors(monkeypatch, capsys, error):
    code = run_raising(monkeypatch, error, "--json")
    out, err = capsys.readouterr()
    data = json.loads(out)["error"]
    assert data["exit_code"] == code
    assert data["type"] in CODES
    assert "no" in data["message"]
    assert err


def test_help_lists_every_code(capsys):
    assert main.run(["--help"]) == 0
    text = capsys.readouterr().out
    for code in (0, 1, *CODES.values()):
        assert f" {code} " in text
