"""The `rectify` command. Verbs are imported only when they are called, so that `rectify --help` is instant."""

import argparse
import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from deploy.hints import explain, nearest, one_line

VERBS = {
    "pack": ("data.images:pack", "pack a folder of images (or the bundled digits) into webdataset shards"),
    "index": ("data.index:index", "index webdataset tars that others made, to read them like our own"),
    "fit": ("deploy.fit:fit", "train an autoencoder, a teacher or a student (LightningCLI: --config, --print_config)"),
    "encode": ("trainer.encode:encode", "encode packed images into shards of latents"),
    "collect": ("trainer.collect:collect", "collect (noise, sample) pairs from a teacher"),
    "invert": ("trainer.invert:invert", "carry real latents to noise through a teacher, as pairs to mix among collected ones"),
    "sample": ("trainer.sample:sample", "draw a grid of images from a run"),
    "evaluate": ("trainer.evaluate:evaluate", "measure quality against the number of network evaluations"),
    "likelihood": ("trainer.likelihood:likelihood", "measure the likelihood of held-out samples, in nats and bits per dimension"),
    "export": ("deploy.export:export", "write a diffusers folder that plain diffusers loads"),
    "ema": ("trainer.posthoc:ema", "reconstruct the average of another width from a run's EMA snapshots"),
    "consolidate": ("trainer.consolidate:consolidate", "write a checkpoint, sharded or not, as one safetensors file"),
    "delta": ("trainer.delta:delta", "write a student as its difference from its base, or apply one to a fine-tune of it"),
    "picture": ("trainer.picture:picture", "draw how noise is carried to data, in the plane or on a line, for the eye"),
    "plane": ("trainer.picture.forms:plane", "measure rectification of every form on a law of the plane, over seeds"),
    "report": ("trainer.report:report", "write summary.json and a self-contained report.html of a pipeline's folder"),
    "table": ("trainer.report.spread:table", "tabulate evaluations of models that were trained with several seeds"),
    "results": ("trainer.report.claims:results", "tabulate what a pipeline found of the field's claims, with costs"),
    "run": ("deploy.run:run", "run a pipeline of these, skipping what is finished"),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the first word."""
    lines = [f"  {verb:11} {text}" for verb, (_, text) in VERBS.items()]
    top = argparse.ArgumentParser(
        prog="rectify",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="rectify [-h] VERB ...",
        description="Trains image generators and turns slow ones into fast ones.\n\n" + "\n".join(lines),
        epilog="`rectify VERB --help` tells a verb's options. Start with `rectify run configs/digits/pipeline.yaml`.",
    )
    top.add_argument("verb", metavar="VERB", choices=VERBS, help=argparse.SUPPRESS)
    return top


def call(verb: str, args: Sequence[str]) -> None:
    """Import a verb and call it with arguments parsed by its own signature."""
    logging.basicConfig(format="%(name)s: %(message)s")
    for room in ("models", "data", "trainer", "deploy"):
        logging.getLogger(room).setLevel(logging.INFO)
    module, _, name = VERBS[verb][0].partition(":")
    function = getattr(importlib.import_module(module), name)
    if verb == "fit":
        return function(args)
    from jsonargparse import ArgumentError, ArgumentParser

    about = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    options = ArgumentParser(prog=f"rectify {verb}", description=about, exit_on_error=False)
    names = options.add_function_arguments(function, as_positional=verb == "run")
    try:
        values = options.instantiate_classes(options.parse_args(list(args)))
    except ArgumentError as error:
        raise ValueError(f"{verb}: {explain(error, names)}") from None
    function(**values.as_dict())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Bad input is one line and exit code 2 (RECTIFY_TRACEBACK=1 shows where it arose), a defect of ours 1."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch: idle OpenMP threads must not starve other ranks
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        parser().print_help()
        return 2
    verb = words[0]
    if not verb.startswith("-") and verb not in VERBS:
        print(f"rectify: error: no verb {verb!r}{nearest(verb, VERBS) or '; see rectify --help'}", file=sys.stderr)
        return 2
    verb = parser().parse_args(words[:1]).verb
    try:
        call(verb, words[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("RECTIFY_TRACEBACK"):
            raise
        print(f"rectify: error: {one_line(error)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"rectify: error: not enough memory: {one_line(error)}; lower the batch or the size asked for", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"rectify: error: {one_line(error)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("rectify: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print("rectify: error: a defect of rectify; please report it with the lines above and the command", file=sys.stderr)
        return 1
    return 0
