"""The program: commands are imported when they are called, errors become sentences and exit codes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from types import MappingProxyType

import click

from sepdeploy.bench.outside_programs import ended_by_signals
from sepdeploy.core.passing_errors import is_out_of_memory
from sepdeploy.errors import ContractError, SepdeployError, ToolError, UsageError
from sepdeploy.render.format_numbers import printable
from sepdeploy.version import __version__

__all__ = ["main", "program"]

_COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "convert": ("sepdeploy.cli.convert", "Convert a trained network into a smaller, faster one, with proof."),
        "plan": ("sepdeploy.cli.plan", "Weigh every form of every layer on the target; say what is best and why."),
        "finetune": (
            "sepdeploy.cli.finetune",
            "Train the network of a finished bundle, and export and measure it again.",
        ),
        "inspect": ("sepdeploy.cli.inspect", "List every convolution: its cost, and what it could become."),
        "design": ("sepdeploy.cli.design", "Build separable variants of a network, to be trained from scratch."),
        "schemes": ("sepdeploy.cli.schemes", "List the schemes, and what each costs for one convolution."),
        "bench": ("sepdeploy.cli.bench", "Measure the latency of ONNX and TFLite files on this CPU."),
        "targets": ("sepdeploy.cli.targets", "List the targets: what is installed, and how many prices are known."),
        "doctor": ("sepdeploy.cli.doctor", "Say what each target needs here, and how to install what is missing."),
    }
)
_INTERRUPTED = 130

_WITH_LESS_MEMORY = (
    "use fewer --calibration-images, a smaller --input-shape, or a smaller --batch-size where it trains, or end other "
    "programs and run the same command again"
)


class _LazyGroup(click.Group):
    """A group whose commands are modules: `sepdeploy --help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (part of click's interface)
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sepdeploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; may stand anywhere on the line.")
def program(debug: bool) -> None:
    """Rewrite a trained CNN's convolutions into separable ones, keep the accuracy, prove the speed.

    \b
    Example:
      sepdeploy convert model.pt --arch net.py:build --calibration images/ --max-drop 1

    \b
    Exit codes: 0 success; 1 finished, but a promise is broken (not faster, more loss than --max-drop, or another
    limit that was asked for); 2 wrong usage; 3 unsupported network; 4 outside tool failed; 5 untrusted file;
    70 a bug in sepdeploy.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit with its code."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run the program; returns the exit code."""
    is_debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    is_json = "--json" in arguments
    try:
        with ended_by_signals():
            result = program.main(arguments, prog_name="sepdeploy", standalone_mode=False, obj=tuple(arguments))
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return _stopped()
    except KeyboardInterrupt:
        return _stopped()
    except click.ClickException as error:
        if is_json:
            _print_json(UsageError.__name__, error.format_message(), error.exit_code)
        error.show()
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone, and Python would complain about it at exit
        return UsageError.exit_code
    except Exception as error:
        if is_debug:
            import traceback

            traceback.print_exc()
        return _report(_as_ours(error), is_json=is_json, is_debug=is_debug)


def _as_ours(error: Exception) -> SepdeployError:
    """Any error as one of ours: what is left over is a bug."""
    if is_out_of_memory(error):
        # Also where the network or a tool was blamed for it: code that calls them cannot know.
        said = f" ({error})" if isinstance(error, SepdeployError) else ""
        return UsageError(f"out of memory{said}; {_WITH_LESS_MEMORY}")
    if isinstance(error, SepdeployError):
        return error
    if isinstance(error, OSError):
        place = f" {error.filename}" if error.filename else ""
        return UsageError(f"cannot use{place}: {error.strerror or error}")
    return ContractError(
        f"a bug in sepdeploy: {type(error).__name__}: {error}; run again with --debug and report what it prints"
    )


def _report(error: SepdeployError, *, is_json: bool, is_debug: bool) -> int:
    message = " ".join(str(error).split())  # the user's own code may have put lines of its own into it
    if is_json:
        _print_json(type(error).__name__, message, error.exit_code)
    click.echo(f"sepdeploy: {printable(message)}", err=True)
    if isinstance(error, ToolError) and error.stderr and is_debug:
        click.echo(error.stderr, err=True)
    return error.exit_code


def _print_json(kind: str, message: str, exit_code: int) -> None:
    click.echo(json.dumps({"error": {"type": kind, "message": message, "exit_code": exit_code}}))


def _stopped() -> int:
    click.echo("sepdeploy: stopped; finished stages are kept, run the same command again to go on", err=True)
    return _INTERRUPTED
