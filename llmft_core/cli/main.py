"""`llmft`: the command. Every error a user can act on is one line on standard error; `--debug` shows the traceback."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from llmft_core.cli import (
    checkpoint,
    dataset,
    doctor,
    generate,
    plan,
    plugins,
    resume,
    run,
    storage,
    verify_resume,
    weights,
)
from llmft_core.errors import InputError, Interrupted, LlmftError, Problems, Terminated, close_match, one_line

DESCRIPTION = "Fine-tune Llama-2 and other Hugging Face causal language models on a Ray cluster."


def entry_point() -> None:
    """The console script."""
    code = main(sys.argv[1:])
    if code in (Interrupted.exit_code, Terminated.exit_code):
        # Ray's threads do not survive an interpreter that is taken down in the middle of something.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 1 a run failed, 2 the input was wrong, 130 interrupted
    (143 by SIGTERM)."""
    try:
        return dispatch(list(argv))
    except (LlmftError, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        return report(error)
    except BrokenPipeError:
        # The reader has gone (`llmft plugins | head`): not an error, but Python would complain on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def report(error: BaseException) -> int:
    """Print what went wrong and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("llmft: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    if isinstance(error, Problems):
        if error.heading:
            print(f"llmft: error: {error.heading}", file=sys.stderr)
        for problem in error.problems:
            print(f"llmft: error: {problem}", file=sys.stderr)
        return error.exit_code
    kind = "interrupted" if isinstance(error, Interrupted) else "error"
    print(f"llmft: {kind}: {one_line(error)}", file=sys.stderr)
    return error.exit_code if isinstance(error, LlmftError) else 1


def dispatch(argv: list[str]) -> int:
    """Find the command and call it. Those that read a plan's flags parse them themselves: which there are
    depends on the plugins."""
    own: dict[str, Callable[[list[str], Mapping[str, str], Path], int]] = {
        "run": run.run_command,
        "resume": resume.run_command,
        "verify-resume": verify_resume.run_command,
        "plan": plan.run_command,
        "generate": generate.run_command,
        "checkpoint": checkpoint.run_command,
        "dataset": dataset.run_command,
        "weights": weights.run_command,
        "storage": storage.run_command,
    }
    if argv and argv[0] in own:
        return own[argv[0]](argv[1:], os.environ, Path.cwd())
    parser = argparse.ArgumentParser(prog="llmft", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"llmft {version('llmft')}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    common.add_argument(
        "--disable-plugin", action="append", metavar="PLUGIN", help="do not load this plugin; repeatable"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command_name")
    commands.add_parser("run", help="train: `llmft run --help` lists the flags of the chosen plugins")
    commands.add_parser("resume", help="go on with a run from its newest state, here or on other machines")
    commands.add_parser("verify-resume", help="whether a plan, killed and resumed, gives the same bits")
    commands.add_parser("plan", help="say what `llmft run` with the same flags would do, and train nothing")
    commands.add_parser("generate", help="answer a prompt from a checkpoint")
    commands.add_parser("checkpoint", help="list, show, verify, fetch, upload and remove checkpoints in storage")
    commands.add_parser("dataset", help="create, check, preview and measure datasets")
    commands.add_parser("weights", help="fetch, mirror, list and verify pretrained models")
    commands.add_parser("storage", help="check a bucket or folder for runs: permissions, speed, clock")
    for module in (plugins, doctor):
        module.add_parser(commands, common)
    if not argv:
        parser.print_help()
        return InputError.exit_code
    if not argv[0].startswith("-") and argv[0] not in commands.choices:
        known = list(commands.choices)
        raise InputError(f"no command is called {argv[0]}{close_match(argv[0], known)}; there are {', '.join(known)}")
    args = parser.parse_args(argv)  # argparse leaves with exit code 2 where it does not understand
    code: int = args.command(args)
    return code
