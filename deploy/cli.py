"""The `rectify` command.

A verb's module is imported only when the verb is called, so `rectify --help` is instant.
"""

import gc
import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from data.attempts import end_attempts, note_line
from data.lease import release_all
from data.run_output import copy_output
from data.signals import (
    STOPPED_EXIT_CODE,
    Stopped,
    handle_signals,
    raise_if_stopped,
)
from deploy.hints import explain, nearest, one_line
from deploy.launcher import (
    LOST_RANK_EXIT_CODE,
    adopt_launcher,
    end_with_launcher,
    ends_with_others,
    explain_lost_process,
    is_spread,
    is_started_by_lightning,
    kill_children,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Verb: (module:function, help). A verb has one word or two: `rectify report seeds --runs ...`.
VERBS = {
    "pack": (
        "data.pack:pack",
        "pack a folder of images (or the bundled digits) into webdataset shards",
    ),
    "index": (
        "data.index:index",
        "index existing webdataset tars, so that they can be read in any order",
    ),
    "fit": (
        "deploy.fit:fit",
        "train an autoencoder, a teacher or a student (LightningCLI: --config, --print_config)",
    ),
    "encode": ("trainer.jobs.encode:encode", "encode packed images into shards of latents"),
    "collect": ("trainer.jobs.collect:collect", "collect (noise, sample) pairs from a teacher"),
    "invert": (
        "trainer.jobs.invert:invert",
        "invert real latents to noise with a teacher, as pairs to mix with collected ones",
    ),
    "sample": ("trainer.jobs.sample:sample", "sample a grid of images from a run"),
    "evaluate": (
        "trainer.jobs.evaluate:evaluate",
        "measure sample quality against the number of network evaluations",
    ),
    "likelihood": (
        "trainer.jobs.likelihood:likelihood",
        "measure the likelihood of held-out samples, in nats and bits per dimension",
    ),
    "export": (
        "deploy.export:export",
        "write a diffusers pipeline that loads without this project",
    ),
    "ema": (
        "deploy.ema:ema",
        "reconstruct an average of another width from a run's EMA snapshots",
    ),
    "consolidate": (
        "deploy.consolidate:consolidate",
        "write a checkpoint, sharded or not, as one safetensors file",
    ),
    "delta": (
        "deploy.delta:delta",
        "write a student as the difference from its base, or add such a difference to a fine-tune",
    ),
    "report": (
        "deploy.report.page:report",
        "write summary.json and a self-contained report.html for a pipeline's folder",
    ),
    "report seeds": (
        "deploy.report.seeds:report_seeds",
        "tabulate evaluations of models that were trained with several seeds",
    ),
    "report claims": (
        "deploy.report.claims:report_claims",
        "tabulate a pipeline's results for claims of the field, with costs",
    ),
    "toy picture": (
        "trainer.toy.picture:picture",
        "plot how noise is carried to data, in the plane or on a line",
    ),
    "toy benchmark": (
        "trainer.toy.benchmark:benchmark",
        "measure rectification for every interpolant on points of the plane, over seeds",
    ),
    "spread": (
        "deploy.spread:spread",
        "run a command on several processes and nodes: rectify spread --processes 2 -- fit ...",
    ),
    "run": ("deploy.run:run", "run a pipeline of these commands; finished stages are skipped"),
    "launch": (
        "deploy.launch.launch:launch",
        "submit a pipeline to Slurm, or start it in the background of this host",
    ),
    "stage": (
        "deploy.launch.stage:run_in_job",
        "run one stage of a pipeline inside its job; the scripts of `rectify launch` call this",
    ),
    "status": ("deploy.status:status", "print the state of a run or a pipeline"),
    "cancel": ("deploy.launch.cancel:cancel", "end a run, or the stages of a pipeline"),
    "logs": ("deploy.launch.logs:logs", "print what a run or a stage has printed"),
}
PACKAGES = ("models", "data", "trainer", "deploy")
# The argument of a verb that has no name: `rectify status RUN`.
POSITIONAL = {
    "run": "config",
    "launch": "config",
    "status": "folder",
    "cancel": "folder",
    "logs": "folder",
    "spread": "command",
}
BOOLEANS = ("true", "false", "yes", "no")


def help_text(group: str = "") -> str:
    """Return the list of verbs, or only of those whose first word is `group`."""
    lines = [f"usage: rectify [-h] {group or 'VERB'} ...", ""]
    if not group:
        lines += ["Train image generators, and turn slow ones into fast ones.", ""]
    for verb, (_, text) in VERBS.items():
        if not group or verb.split()[0] == group:
            lines.append(f"  {verb:14} {text}")
    lines += ["", "`rectify VERB --help` lists a verb's options."]
    if not group:
        lines.append("Start with `rectify run configs/digits/pipeline.yaml --smoke`.")
    return "\n".join(lines)


def two_word_verbs(first: str) -> list[str]:
    """Return the verbs of two words that start with a word."""
    return [verb for verb in VERBS if verb.startswith(f"{first} ")]


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command's words into the verb, of one word or two, and its options.

    Raises:
        ValueError: there is no such verb; the message suggests the nearest one.
    """
    # a verb of two words
    pair = " ".join(words[:2])
    if pair in VERBS:
        return pair, list(words[2:])

    # a second word that belongs to no verb, such as `report sedes`
    first = words[0]
    second_words = two_word_verbs(first)
    has_second_word = len(words) > 1 and not words[1].startswith("-")
    if second_words and (has_second_word or first not in VERBS):
        wanted = pair if has_second_word else first
        hint = nearest(wanted, second_words) or f"; it is one of {', '.join(second_words)}"
        raise ValueError(f"no verb {wanted!r}{hint}")

    # a verb of one word
    if first in VERBS:
        return first, list(words[1:])
    hint = nearest(pair, VERBS) or nearest(first, VERBS) or "; see rectify --help"
    raise ValueError(f"no verb {first!r}{hint}")


def complete_flags(
    words: Iterable[str], flags: Iterable[str], positional: bool = False
) -> list[str]:
    """Return a command's words with `true` inserted after every boolean option that has no value.

    Args:
        words: the options, e.g. `--smoke --jobs 2`.
        flags: names of the boolean options, without `--`.
        positional: the command has an argument without a name, which may follow a bare option.
    """
    words = list(words)
    options = {f"--{name}" for name in flags}
    completed = []
    for word, following in zip(words, [*words[1:], "--"]):
        completed.append(word)
        is_bare = following.startswith("--") or following == "-h"
        if positional and following.lower() not in BOOLEANS:
            is_bare = True
        if word in options and is_bare:
            completed.append("true")
    return completed


def import_verb(name: str) -> ModuleType:
    """Import a verb's module without garbage collection.

    What imports create lives until the process ends. The collector would look through it during
    the imports and several times at the end: a third of the time that a short command takes.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def call(verb: str, args: Sequence[str]) -> None:
    """Import a verb's function and call it with its arguments; for --help, print its help.

    `fit` parses its arguments itself.
    """
    module, _, name = VERBS[verb][0].partition(":")
    options = args[: args.index("--")] if "--" in args else args  # without a command to spread
    if verb != "fit" and {"-h", "--help"} & set(options):
        from deploy.help import format_help

        positional = POSITIONAL.get(verb, "")
        print(format_help(verb, module, name, positional, two_word_verbs(verb)))
        return
    logging.basicConfig(format="%(name)s: %(message)s")
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    function = getattr(import_verb(module), name)
    if verb == "fit":
        function(args)
    elif verb == "spread":
        spread = partial(function, list(args[len(options) + 1 :]))
        spread(**parse_options(verb, spread, options))
    else:
        function(**parse_options(verb, function, args))


def parse_options(verb: str, function: Callable[..., None], args: Sequence[str]) -> dict[str, Any]:
    """Parse a verb's options by the signature of its function.

    A parameter whose type is a dataclass is a group of options: one for each of its fields.

    Raises:
        ValueError: an option or value is wrong; the message names it and the nearest right name.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from deploy.yaml_files import expand_home

    # Describe the command: a dataclass is replaced by its fields.
    parameters = dict(inspect.signature(function).parameters)
    groups: dict[str, Any] = {}
    for name, parameter in list(parameters.items()):
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parameters.pop(name)
            parameters |= inspect.signature(groups[name]).parameters
    flags = [name for name, parameter in parameters.items() if parameter.annotation is bool]
    # A parameter such as `from_` has an underscore since its name is a word of Python.
    parameters = {name.rstrip("_"): parameter for name, parameter in parameters.items()}
    positional = POSITIONAL.get(verb, "")
    options = ArgumentParser(prog=f"rectify {verb}", exit_on_error=False)
    for name, parameter in parameters.items():
        add_option(options, name, parameter, positional)

    # Parse the options; `--dry-run` means `--dry_run`.
    args = [rename_option(word, parameters) for word in args]
    check_no_empty_path(args, parameters)
    try:
        parsed = options.parse_args(complete_flags(args, flags, bool(positional)))
        values = options.instantiate_classes(expand_home(parsed)).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{verb}: {explain(error, parameters)}") from None

    # Gather the options of each group.
    values = {parameters[name].name: value for name, value in values.items()}
    for name, group in groups.items():
        members = {field.name: values.pop(field.name) for field in fields(group)}
        values[name] = group(**members)
    return values


def rename_option(word: str, names: Collection[str]) -> str:
    """Return an option with the underscores of its name, if it was given with dashes."""
    name, equals, value = word.removeprefix("--").partition("=")
    renamed = name.replace("-", "_")
    if word.startswith("--") and renamed in names:
        return f"--{renamed}{equals}{value}"
    return word


def check_no_empty_path(words: Sequence[str], parameters: dict[str, inspect.Parameter]) -> None:
    """Check that no path among a command's options is empty: it would be the current folder."""
    for word, following in zip(words, [*words[1:], "--"]):
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = following
        if name in parameters and "Path" in str(parameters[name].annotation) and not value:
            raise ValueError(f"--{name} is empty; give a path, or leave the option out")


def add_option(
    options: "ArgumentParser", name: str, parameter: inspect.Parameter, positional: str
) -> None:
    """Add an option for a parameter of a function.

    Args:
        options: the parser.
        name: of the option.
        parameter: the parameter.
        positional: the option that is an argument without a name.
    """
    if parameter.default is not parameter.empty:
        options.add_argument(f"--{name}", type=parameter.annotation, default=parameter.default)
    elif name == positional:
        options.add_argument(name, type=parameter.annotation)
    else:
        options.add_argument(f"--{name}", type=parameter.annotation, required=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Bad input is one line and exit code 2; with RECTIFY_TRACEBACK=1 its traceback is raised instead.
    A loss that is not finite is exit code 3. A signal that stopped the verb is exit code 75. A bug
    of this program is exit code 1.
    """
    code = 1
    is_process = argv is None
    if is_process:
        copy_output()
    try:
        code = run_until_stopped(list(sys.argv[1:] if argv is None else argv), is_process)
        return code
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        # Lightning kills all ranks when one that it started does not end with 0.
        if code == STOPPED_EXIT_CODE and is_started_by_lightning():
            return 0
        raise
    finally:
        end_attempts(code)
        release_all()
        if is_process:
            kill_children()


def run_until_stopped(words: list[str], is_process: bool) -> int:
    """Run the verb of a command, and return the exit code; a signal to stop is printed.

    Args:
        words: of the command.
        is_process: the process ends after the command.
    """
    try:
        with handle_signals(ends_process=is_process):
            end_with_launcher()
            # Set before torch is imported: idle OpenMP threads must not take other ranks' cores,
            # and warnings of its connections (a host without a name) are no use to a user.
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            return run_verb(words)
    except Stopped as stopped:
        text = f"stopped by {stopped}"
        note_line(text)
        if not is_spread():
            print(f"rectify: {text}; run the same command again to continue", file=sys.stderr)
        return STOPPED_EXIT_CODE
    except KeyboardInterrupt:
        print("rectify: stopped; run the same command again to continue", file=sys.stderr)
        return 130


def run_verb(words: list[str]) -> int:
    """Run the verb of a command, and return the exit code; errors are printed.

    Raises:
        Stopped: a signal asked the command to stop.
    """
    # help
    if not words:
        print(help_text())
        return 2
    if words[0] in ("-h", "--help"):
        print(help_text())
        return 0
    is_group = words[0] not in VERBS and len(two_word_verbs(words[0])) > 0
    if is_group and words[1:2] in (["-h"], ["--help"]):
        print(help_text(words[0]))
        return 0

    # the verb
    try:
        verb, args = split_verb(words)
        adopt_launcher(verb)
        call(verb, args)
    except (ValueError, OSError) as error:
        if os.environ.get("RECTIFY_TRACEBACK"):
            raise
        return fail_lost(error) or fail(one_line(error), 2)
    except MemoryError as error:
        return fail(f"not enough memory: {one_line(error)}; lower the batch or the size", 2)
    except FloatingPointError as error:
        return fail(one_line(error), 3)
    except Exception as error:
        raise_if_stopped()
        code = fail_lost(error)
        if code:
            return code
        traceback.print_exc()
        return fail("a bug in rectify; please report the lines above and the command", 1)
    return 0


def fail_lost(error: Exception) -> int:
    """Print which other process has ended, if an error means that; return the exit code, or 0."""
    world = os.environ.get("WORLD_SIZE", "")
    lost = explain_lost_process(error, int(world) if world.isdecimal() else 1)
    return fail(lost.message, lost.code) if lost else 0


def fail(message: str, code: int) -> int:
    """Print an error as one line and return the exit code."""
    note_line(message)
    if code == LOST_RANK_EXIT_CODE and is_spread() and ends_with_others():
        return code  # `rectify spread` prints the line of the rank that ended first
    print(f"rectify: error: {message}", file=sys.stderr)
    return code
