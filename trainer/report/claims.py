"""The field's claims, tried: what a pipeline's evaluations say of each, and what every method cost until then."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from data.files import atomic, naming, write_json
from data.form import COUNT, NAME, NUMBER, conform
from trainer.picture import forms
from trainer.report.costs import Costs
from trainer.report.spread import BEGIN, FORM, alike, cell, ends, replaced
from trainer.report.summary import ROW, read, run_log

CLAIM = {"title": str, "methods": [NAME], "steps": [COUNT], "teacher": NAME}
MAY: dict[str, Any] = {"passes": [NAME], "reach": float, "trained": bool, "seeds": [NAME]}  # that a claim may say beside
QUALITY = ("fd", "accuracy", "recall")
SHAPE = ("first_orderness", "straightness")
MEASURED = {**FORM, "run": str, "straightness": float, "steps": {NUMBER: {**ROW, "accuracy": float}}}


def stated(told: Any, where: str) -> dict[str, Any]:
    """Return the claims that a file states; refuse what is none."""
    conform(told, {"claims": {NAME: CLAIM}}, where)
    for name, claim in told["claims"].items():
        for key in claim.keys() - CLAIM.keys():
            if key not in MAY:
                raise ValueError(f"{where}: claim {name}: has an entry `{key}`; known are {', '.join((*CLAIM, *MAY))}")
            conform(claim[key], MAY[key], f"{where}: claim {name}: {key}")
        if not claim["steps"] or not {*claim.get("passes", [])} <= {*claim["methods"]}:
            raise ValueError(f"{where}: claim {name}: needs steps, and `passes` must name some of its methods")
    return told["claims"]


def found(run: Path, costs: Costs, method: str) -> dict[int, dict[str, Any]]:
    """Return a method's evaluations, by steps trained: on how many samples, what it cost, and by seed what was measured.

    They lie in RUN/evaluation/METHOD/SEED/AT/evaluation.json, whatever AT is called.
    """
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted((run / "evaluation" / method).glob("*/*/evaluation.json")):
        one = read(path, MEASURED)
        place, _, checkpoint = costs.place(one["run"]).partition("/checkpoints/step=")
        config, log = run / place / "config.yaml", run / place / "metrics.jsonl"
        with naming(config):
            batch = yaml.safe_load(config.read_text())["data"]["batch"]
        step = int(checkpoint.removesuffix(".ckpt")) if checkpoint else max(values["step"] for values in run_log(log.parent))
        row = rows.setdefault(step, {"trained": step * batch, "evaluations": costs.whole(place, step), "seeds": {}})
        row["seeds"][path.parts[-3]] = one
    return rows


def chosen(rows: dict[int, dict[str, Any]], seeds: list[str] | None) -> dict[int, dict[str, Any]]:
    """Return a method's evaluations of these seeds alone, of all if none are named."""
    if seeds is None:
        return rows
    own = {
        step: {**row, "seeds": {seed: row["seeds"][seed] for seed in seeds if seed in row["seeds"]}} for step, row in rows.items()
    }
    return {step: row for step, row in own.items() if row["seeds"]}


def tell(claim: str, method: str, row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return a row of the results: a method, trained so far, sampled with a number of steps, its measures by seed."""
    seeds = {seed: one for seed, one in row["seeds"].items() if str(steps) in one["steps"]}
    quality = {key: {seed: one["steps"][str(steps)][key] for seed, one in seeds.items()} for key in QUALITY}
    shape = {key: {seed: one[key] for seed, one in seeds.items()} for key in SHAPE}
    about = {"claim": claim, "method": method, "steps": steps}
    return {**about, "trained": row["trained"], "evaluations": row["evaluations"], **quality, **shape}


def taught(row: dict[str, Any], method: str) -> dict[str, Any]:
    """Return what a claim's teacher draws in its most steps, and what its training cost."""
    most = max(next(iter(row["seeds"].values()))["steps"], key=int)
    told = tell("", method, row, int(most))
    return {"method": method, "steps": int(most), "evaluations": row["evaluations"], **{key: told[key] for key in QUALITY}}


def gather(run: Path, claims: dict[str, Any]) -> dict[str, Any]:
    """Return the results: `rows`, each a claim, a method, a number of steps and the measures by seed, and what was compared.

    A claim whose teacher was not evaluated is left out, other methods that were not are named in `missing`. `plane` is there if
    RUN/plane/plane.json is: the figures of `rectify plane`.

    Raises:
        FileNotFoundError: no method was evaluated.
        ValueError: evaluations that are to be compared differ in what was measured.
    """
    costs = Costs(run)
    names = dict.fromkeys(name for claim in claims.values() for name in (claim["teacher"], *claim["methods"]))
    methods = {name: rows for name in names if (rows := found(run, costs, name))}
    every = [one for rows in methods.values() for row in rows.values() for one in row["seeds"].values()]
    if not every:
        raise FileNotFoundError(f"{run / 'evaluation'}: no METHOD/SEED/AT/evaluation.json of a claim's methods below it")
    told, teachers = [], {}
    for name, claim in claims.items():
        mine = {method: own for method, rows in methods.items() if (own := chosen(rows, claim.get("seeds")))}
        if claim["teacher"] not in mine:
            continue
        of = mine[claim["teacher"]]
        teachers[name] = taught(of[max(of)], claim["teacher"])
        if not teachers[name]["evaluations"]:
            raise ValueError(f"{run / claim['teacher']}: its metrics.jsonl counts no evaluations; train it again to tell costs")
        for method in (method for method in claim["methods"] if method in mine):
            by = mine[method]
            kept = sorted(by) if claim.get("trained") else [max(by)]
            told += [tell(name, method, by[step], steps) for step in kept for steps in claim["steps"]]
    missing = [name for name in names if name not in methods]
    terms = alike(every, str(run / "evaluation"))
    path = run / "plane" / "plane.json"
    plane = {"plane": read(path, forms.FIGURES)} if path.exists() else {}
    if plane and not plane["plane"]["rows"]:
        raise ValueError(f"{path}: holds no rows; delete {path.parent} and run `rectify plane` again")
    return {"format": 1, **terms, **plane, "teachers": teachers, "missing": missing, "rows": [row for row in told if row["fd"]]}


def cheapest(rows: list[dict[str, Any]], fd: Callable[[dict[str, Any]], float], limit: float) -> dict[str, Any] | None:
    """Return the cheapest of rows whose FD, as it is counted, is at most a limit."""
    reached = [row for row in rows if fd(row) <= limit]
    return min(reached, key=lambda row: row["evaluations"]) if reached else None


def median(row: dict[str, Any]) -> float:
    """Return a row's median FD."""
    return ends(row["fd"])["median"]


def ratio(row: dict[str, Any], teacher: dict[str, Any]) -> float:
    """Return the median over seeds of a row's FD over that of the teacher of the same seed, or of all where it has no other."""
    return ends({seed: fd / teacher["fd"].get(seed, median(teacher)) for seed, fd in row["fd"].items()})["median"]


def passing(other: str, mine: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return lines on how many samples each method needed to be as good as another is at its end, by number of steps."""
    lines = []
    for steps in dict.fromkeys(row["steps"] for row in mine[other]):
        last = [row for row in mine[other] if row["steps"] == steps][-1]
        goal = median(last)
        for method, rows in mine.items():
            first = cheapest([row for row in rows if row["steps"] == steps], median, goal)
            said = f"after {first['trained']:,} samples ({first['trained'] / last['trained']:.0%})" if first else "never"
            lines.append(f"- {method} in {steps} step{'s' * (steps > 1)}: as good as {other} at its end (FD {goal:.2f}) {said}")
    return lines


def reaching(share: float, mine: dict[str, list[dict[str, Any]]], teacher: dict[str, Any]) -> list[str]:
    """Return lines on what each method had spent when its one step came so near the teacher's most, the cheapest first."""
    single = {method: [row for row in rows if row["steps"] == 1] for method, rows in mine.items()}

    def near(row: dict[str, Any]) -> float:
        return ratio(row, teacher)

    first = {method: cheapest(rows, near, share) for method, rows in single.items()}
    what = f"Spent when FD in one step was first within {share} times the teacher's in {teacher['steps']}, seed by seed"
    lines = [f"{what}, and how near it came at the end:", ""]
    for method, row in sorted(first.items(), key=lambda item: item[1]["evaluations"] if item[1] else math.inf):
        last = f", {near(single[method][-1]):.2f} times" if single[method] else ""
        lines.append(f"- {method}: {cost(row, teacher) if row else 'never'}{last}")
    return lines


def cost(row: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Return the evaluations spent on a row, and in units of the teacher's training."""
    return f"{row['evaluations']:,} ({row['evaluations'] / teacher['evaluations']:.2f})"


def markdown(name: str, claim: dict[str, Any], results: dict[str, Any]) -> str:
    """Return a claim's table: a row for each method and length of training, a column for each number of steps."""
    if name not in results["teachers"]:
        return f"Not evaluated yet: {claim['teacher']}."
    rows, teacher = [row for row in results["rows"] if row["claim"] == name], results["teachers"][name]
    head = ["method", "samples", "evaluations", *(f"FD at {n}" for n in claim["steps"])]
    head += ["accuracy at the fewest", "first-order", "straight"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, trained in dict.fromkeys((row["method"], row["trained"]) for row in rows):
        own = {row["steps"]: row for row in rows if (row["method"], row["trained"]) == (method, trained)}
        first = next(iter(own.values()))
        fds = [cell(ends(own[n]["fd"])) if n in own else "" for n in claim["steps"]]
        rest = [f"{ends(first['accuracy'])['median']:.3f}", *(f"{ends(first[key])['median']:.3g}" for key in SHAPE)]
        lines.append(f"| {' | '.join([method, f'{trained:,}', cost(first, teacher), *fds, *rest])} |")
    fd, accuracy = cell(ends(teacher["fd"])), ends(teacher["accuracy"])["median"]
    lines += ["", f"{teacher['method']} in {teacher['steps']} steps: FD {fd}, accuracy {accuracy:.3f}.", ""]
    mine = {method: [row for row in rows if row["method"] == method] for method in claim["methods"]}
    if missing := [method for method in mine if not mine[method]]:
        lines += [f"Not evaluated yet: {', '.join(missing)}.", ""]
    for other in claim.get("passes", []):
        lines += passing(other, mine)
    if "reach" in claim:
        lines += reaching(claim["reach"], mine, teacher)
    return "\n".join(lines).rstrip()


def panel(axes: Any, rows: dict[str, list[dict[str, Any]]], followed: bool) -> None:
    """Draw each method's FD: in its fewest steps against evaluations spent if training was followed, else against steps."""
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for (method, own), colour in zip(rows.items(), colours[::2] + colours[1::2]):
        own = [row for row in own if not followed or row["steps"] == own[0]["steps"]]
        where, spread = [row["evaluations" if followed else "steps"] for row in own], [ends(row["fd"]) for row in own]
        axes.plot(where, [one["median"] for one in spread], "o-", markersize=3, label=method, color=colour)
        bands = [one["least"] for one in spread], [one["largest"] for one in spread]
        axes.fill_between(where, *bands, color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", ylabel="Frechet distance", xlabel="evaluations spent" if followed else "steps")
    if not followed:
        axes.set_xticks(ticks := [1, 2, 4, 8, 16, 32], map(str, ticks))
        axes.xaxis.set_minor_locator(NullLocator())
    for part in (axes.yaxis, *([axes.xaxis] if followed else [])):
        part.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value / 1000:,.0f} k"))
        part.set_major_formatter(part.get_minor_formatter())
    if followed and axes.get_xlim()[1] > 5 * axes.get_xlim()[0]:  # every digit would be too many
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(which="both", labelsize=7)


def plot(claims: dict[str, Any], results: dict[str, Any]) -> bytes:
    """Return the figures as PNG, a panel for each claim."""
    matplotlib.use("agg")
    height = (len(claims) + 1) // 2
    figure = Figure(figsize=(15, 4.4 * height), layout="constrained")
    panels = figure.subplots(height, 2, squeeze=False).flatten()
    for axes in panels[len(claims) :]:
        axes.set_visible(False)
    for axes, (name, claim) in zip(panels, claims.items()):
        rows = [row for row in results["rows"] if row["claim"] == name]
        by = {method: [row for row in rows if row["method"] == method] for method in claim["methods"]}
        panel(axes, {method: own for method, own in by.items() if own}, claim.get("trained", False))
        axes.set_title(f"{name}. {claim['title']}", fontsize=10)
        if name in results["teachers"]:
            teacher = results["teachers"][name]
            axes.axhline(ends(teacher["fd"])["median"], linestyle=":", color="grey", label=f"teacher, {teacher['steps']} steps")
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def sections(claims: dict[str, Any], results: dict[str, Any], text: str) -> dict[str, tuple[str, str]]:
    """Return the parts of a text: a heading and what stands below it for each claim, and for the plane if it was measured.

    Where it was not, a text that has a part for it is told so.
    """
    found = {f"claim {name}": (f"{name}. {claim['title']}", markdown(name, claim, results)) for name, claim in claims.items()}
    if "plane" in results:
        found["plane"] = "In the plane", forms.markdown(results["plane"])
    elif BEGIN.format("plane") in text:
        found["plane"] = "In the plane", "Not measured yet: `rectify plane --out RUN/plane`."
    return found


def results(run: Path, claims: Path, out: Path) -> None:
    """Tabulate what a pipeline found of each claim: parts of the Markdown file OUT, with JSON and a plot of its name beside it.

    In a file that is there already, what stands between a claim's two marks is replaced, and the text around them stays.

    Args:
        run: folder of the pipeline, with RUN/evaluation/METHOD/SEED/AT for every run, or checkpoint, that was evaluated, and
            RUN/plane of `rectify plane`, if that was run.
        claims: YAML: each claim's title, methods, steps and teacher; `trained` tells of every checkpoint that was evaluated,
            `passes` what the methods need to be as good as each of these, `reach` to come within so many times the teacher's FD;
            `seeds` names those that are compared, if not all.
        out: the Markdown file; OUT's .json and .png are written beside it.
    """
    with naming(claims):
        told = yaml.safe_load(claims.read_text())
    told = stated(told, str(claims))
    gathered = gather(run, told)
    text = out.read_text() if out.exists() else ""
    for what, (heading, part) in sections(told, gathered, text).items():
        text = replaced(text, what, part, out, f"## {heading}")
        print(f"{heading}\n\n{part}\n")
    write_json(out.with_suffix(".json"), gathered)
    with atomic(out.with_suffix(".png")) as file:
        file.write(plot(told, gathered))
    with atomic(out) as file:
        file.write(text.encode())
