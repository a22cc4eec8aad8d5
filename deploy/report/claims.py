"""`rectify report claims`: a pipeline's results for claims of the field, with the cost of each.

A claim compares methods by their quality in some numbers of steps, and by what they cost.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from data.files import atomic_file, errors_named, write_json
from data.schema import COUNT, NAME, NUMBER, check_schema
from deploy.report.costs import Costs
from deploy.report.seeds import (
    BEGIN,
    SEED_SCHEMA,
    STEP_TICKS,
    cell,
    common_conditions,
    median_and_range,
    plot_band,
    replace_part,
)
from deploy.report.summary import STEPS_SCHEMA, column, read_checked, run_log
from deploy.yaml_files import read_yaml
from trainer.toy import benchmark

# Keys of a claim: those that it must have, and those that it may have.
CLAIM_SCHEMA = {"title": str, "methods": [NAME], "steps": [COUNT], "teacher": NAME}
OPTIONAL_SCHEMA: dict[str, Any] = {
    "passes": [NAME],
    "reach": float,
    "trained": bool,
    "seeds": [NAME],
}
QUALITY_MEASURES = ("fd", "accuracy", "recall")
TRAJECTORY_MEASURES = ("first_orderness", "straightness")
METHOD_SCHEMA = {
    **SEED_SCHEMA,
    "run": str,
    "straightness": float,
    "steps": {NUMBER: {**STEPS_SCHEMA, "accuracy": float}},
}
TOY_HEADING = "In the plane"

Row = dict[str, Any]  # of the results, see `result_row`


class TrainedMethod(NamedTuple):
    """A method after some training."""

    trained: int  # samples
    evaluations: int  # its cost, with everything that it was made from
    seeds: dict[str, dict[str, Any]]  # its evaluation.json, by seed


def select(rows: list[Row], key: str, value: Any) -> list[Row]:
    """Return the rows with a value."""
    return [row for row in rows if row[key] == value]


def check_claims(content: Any, where: str) -> dict[str, Any]:
    """Return the claims of a YAML file, by name.

    Raises:
        ValueError: the file or a claim is not as described in `report_claims`.
    """
    check_schema(content, {"claims": {NAME: CLAIM_SCHEMA}}, where)
    for name, claim in content["claims"].items():
        for key in claim.keys() - CLAIM_SCHEMA.keys():
            if key not in OPTIONAL_SCHEMA:
                keys = ", ".join((*CLAIM_SCHEMA, *OPTIONAL_SCHEMA))
                raise ValueError(f"{where}: claim {name}: no key `{key}`; the keys are {keys}")
            check_schema(claim[key], OPTIONAL_SCHEMA[key], f"{where}: claim {name}: {key}")
        if not claim["steps"]:
            raise ValueError(f"{where}: claim {name}: steps is empty; give numbers of steps")
        unknown = sorted(set(claim.get("passes", [])) - set(claim["methods"]))
        if unknown:
            raise ValueError(
                f"{where}: claim {name}: passes names {unknown[0]}, which is not one of its methods"
            )
    return content["claims"]


def read_method(run: Path, costs: Costs, method: str) -> dict[int, TrainedMethod]:
    """Return a method's evaluations by the number of steps that it was trained for.

    The evaluations are RUN/evaluation/METHOD/SEED/AT/evaluation.json, where AT may be any name.
    """
    by_step: dict[int, TrainedMethod] = {}
    for path in sorted((run / "evaluation" / method).glob("*/*/evaluation.json")):
        evaluation = read_checked(path, METHOD_SCHEMA)
        seed = path.parts[-3]

        # the run that was evaluated, at a checkpoint or at its end
        run_name, _, checkpoint = costs.name_of(evaluation["run"]).partition("/checkpoints/step=")
        if checkpoint:
            step = int(checkpoint.removesuffix(".ckpt"))
        else:
            step = max(column(run_log(run / run_name), "step"))
        config = run / run_name / "config.yaml"
        with errors_named(config):
            batch = yaml.safe_load(config.read_text())["data"]["batch"]

        if step not in by_step:
            cost = costs.total(run_name, step)
            by_step[step] = TrainedMethod(step * batch, cost, {})
        by_step[step].seeds[seed] = evaluation
    return by_step


def select_seeds(
    by_step: dict[int, TrainedMethod], seeds: list[str] | None
) -> dict[int, TrainedMethod]:
    """Return a method's evaluations of some seeds alone, or of all if `seeds` is None."""
    if seeds is None:
        return by_step
    selected = {}
    for step, entry in by_step.items():
        kept = {seed: entry.seeds[seed] for seed in seeds if seed in entry.seeds}
        if kept:
            selected[step] = entry._replace(seeds=kept)
    return selected


def result_row(claim: str, method: str, entry: TrainedMethod, steps: int) -> Row:
    """Return a row of the results: a method at one length of training and one number of steps.

    Its measures are by seed. They are empty if it was not evaluated at that number of steps.
    """
    row: Row = {
        "claim": claim,
        "method": method,
        "steps": steps,
        "trained": entry.trained,
        "evaluations": entry.evaluations,
    }
    for key in (*QUALITY_MEASURES, *TRAJECTORY_MEASURES):
        row[key] = {}
    for seed, evaluation in entry.seeds.items():
        if str(steps) not in evaluation["steps"]:
            continue
        for key in QUALITY_MEASURES:
            row[key][seed] = evaluation["steps"][str(steps)][key]
        for key in TRAJECTORY_MEASURES:
            row[key][seed] = evaluation[key]
    return row


def teacher_row(method: str, entry: TrainedMethod) -> Row:
    """Return the quality of a claim's teacher in its most steps, and the cost of its training."""
    first = next(iter(entry.seeds.values()))
    steps = max(map(int, first["steps"]))
    row = result_row("", method, entry, steps)
    kept = ("method", "steps", "evaluations", *QUALITY_MEASURES)
    return {key: row[key] for key in kept}


def claim_rows(
    name: str, claim: dict[str, Any], methods: dict[str, dict[int, TrainedMethod]]
) -> list[Row]:
    """Return the rows of a claim: of all lengths of training if it has `trained`, else the last."""
    rows = []
    for method in claim["methods"]:
        if method not in methods:
            continue
        by_step = methods[method]
        kept = sorted(by_step) if claim.get("trained") else [max(by_step)]
        for step in kept:
            for steps in claim["steps"]:
                row = result_row(name, method, by_step[step], steps)
                if row["fd"]:
                    rows.append(row)
    return rows


def read_toy_figures(path: Path) -> dict[str, Any]:
    """Return the figures of `rectify toy benchmark`."""
    figures = read_checked(path, benchmark.FIGURES)
    if not figures["rows"]:
        raise ValueError(
            f"{path}: it has no rows; delete {path.parent} and run `rectify toy benchmark` again"
        )
    return figures


def gather(run: Path, claims: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a pipeline for claims.

    Returns:
        `rows`, see `result_row`; `teachers`, by claim; `missing`, the methods that were not
        evaluated; the conditions of the evaluations; `plane`, the figures of `rectify toy
        benchmark`, if RUN/plane/plane.json exists. A claim has no rows if its teacher was not
        evaluated.

    Raises:
        FileNotFoundError: no method was evaluated.
        ValueError: two evaluations were measured differently.
    """
    # read the evaluations of all methods
    costs = Costs(run)
    names: dict[str, None] = {}
    for claim in claims.values():
        names |= dict.fromkeys((claim["teacher"], *claim["methods"]))
    methods = {}
    evaluations: list[dict[str, Any]] = []
    for name in names:
        by_step = read_method(run, costs, name)
        if by_step:
            methods[name] = by_step
        for entry in by_step.values():
            evaluations += entry.seeds.values()
    if not evaluations:
        raise FileNotFoundError(
            f"{run / 'evaluation'}: there is no METHOD/SEED/AT/evaluation.json of a claim's "
            "method in it; run the pipeline first"
        )

    # collect the rows of each claim
    rows = []
    teachers = {}
    for name, claim in claims.items():
        selected = {}
        for method, by_step in methods.items():
            kept = select_seeds(by_step, claim.get("seeds"))
            if kept:
                selected[method] = kept
        teacher = claim["teacher"]
        if teacher not in selected:
            continue
        last = selected[teacher][max(selected[teacher])]
        teachers[name] = teacher_row(teacher, last)
        if not teachers[name]["evaluations"]:
            raise ValueError(
                f"{run / teacher}: its metrics.jsonl counts no evaluations, in which costs are "
                "given; train it again"
            )
        rows += claim_rows(name, claim, selected)

    # put them together
    results = {
        "format": 1,
        **common_conditions(evaluations, str(run / "evaluation")),
        "teachers": teachers,
        "missing": [name for name in names if name not in methods],
        "rows": rows,
    }
    toy_path = run / "plane" / "plane.json"
    if toy_path.exists():
        results["plane"] = read_toy_figures(toy_path)
    return results


def cheapest(rows: list[Row], value: Callable[[Row], float], limit: float) -> Row | None:
    """Return the cheapest row whose value is at most a limit."""
    reached = [row for row in rows if value(row) <= limit]
    return min(reached, key=lambda row: row["evaluations"]) if reached else None


def median_fd(row: Row) -> float:
    """Return a row's median FD over the seeds."""
    return median_and_range(row["fd"])["median"]


def fd_ratio(row: Row, teacher: Row) -> float:
    """Return the median over the seeds of a row's FD divided by its teacher's.

    A seed is compared with the teacher of the same seed, or with the median of all teachers if
    there is none.
    """
    ratios = {}
    for seed, fd in row["fd"].items():
        ratios[seed] = fd / teacher["fd"].get(seed, median_fd(teacher))
    return median_and_range(ratios)["median"]


def samples_to_pass(other: str, by_method: dict[str, list[Row]]) -> list[str]:
    """Return lines on how many samples each method needs to reach another method's final FD."""
    lines = []
    for steps in dict.fromkeys(column(by_method[other], "steps")):
        last = select(by_method[other], "steps", steps)[-1]
        goal = median_fd(last)
        for method, rows in by_method.items():
            first = cheapest(select(rows, "steps", steps), median_fd, goal)
            text = f"the final FD {goal:.2f} of {other}"
            if first:
                share = first["trained"] / last["trained"]
                result = f"reaches {text} after {first['trained']:,} samples ({share:.0%})"
            else:
                result = f"never reaches {text}"
            lines.append(f"- {method} in {steps} step{'s' * (steps > 1)}: {result}")
    return lines


def costs_to_reach(limit: float, by_method: dict[str, list[Row]], teacher: Row) -> list[str]:
    """Return lines on what each method costs until its one step comes near the teacher.

    Args:
        limit: largest ratio of the FD in one step to the teacher's in its most steps.
        by_method: the claim's rows.
        teacher: the claim's teacher.
    """

    def ratio(row: Row) -> float:
        return fd_ratio(row, teacher)

    single = {}
    first = {}
    costs = {}
    for method, rows in by_method.items():
        single[method] = select(rows, "steps", 1)
        row = cheapest(single[method], ratio, limit)
        first[method] = row
        costs[method] = row["evaluations"] if row else math.inf

    lines = [
        f"Evaluations until the FD in one step is at most {limit} times the teacher's in "
        f"{teacher['steps']} (median over the seeds of the ratio to the same seed's teacher), "
        "and the ratio at the end of training:",
        "",
    ]
    for method in sorted(first, key=costs.__getitem__):
        row = first[method]
        text = format_cost(row, teacher) if row else "never"
        if single[method]:
            text += f", {ratio(single[method][-1]):.2f} at the end"
        lines.append(f"- {method}: {text}")
    return lines


def format_cost(row: Row, teacher: Row) -> str:
    """Return the evaluations spent on a row, and their ratio to those of the teacher's training."""
    return f"{row['evaluations']:,} ({row['evaluations'] / teacher['evaluations']:.2f})"


def markdown(name: str, claim: dict[str, Any], results: dict[str, Any]) -> str:
    """Return a claim's table and what follows from it.

    It has a row per method and length of training, and a column per number of steps.
    """
    if name not in results["teachers"]:
        return f"Not evaluated yet: {claim['teacher']}."
    teacher = results["teachers"][name]
    rows = select(results["rows"], "claim", name)

    # the table
    header = ["method", "samples", "evaluations"]
    for n in claim["steps"]:
        header.append(f"FD at {n}")
    header += ["accuracy in the fewest steps", "first-orderness", "straightness"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    by_training: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        by_training.setdefault((row["method"], row["trained"]), {})[row["steps"]] = row
    for (method, trained), by_steps in by_training.items():
        first = next(iter(by_steps.values()))
        cells = [method, f"{trained:,}", format_cost(first, teacher)]
        for n in claim["steps"]:
            cells.append(cell(median_and_range(by_steps[n]["fd"])) if n in by_steps else "")
        cells.append(f"{median_and_range(first['accuracy'])['median']:.3f}")
        for key in TRAJECTORY_MEASURES:
            cells.append(f"{median_and_range(first[key])['median']:.3g}")
        lines.append(f"| {' | '.join(cells)} |")

    # the teacher, and what is missing
    fd = cell(median_and_range(teacher["fd"]))
    accuracy = median_and_range(teacher["accuracy"])["median"]
    text = f"{teacher['method']} in {teacher['steps']} steps: FD {fd}, accuracy {accuracy:.3f}."
    lines += ["", text, ""]
    by_method = rows_by_method(claim, rows)
    missing = [method for method, found in by_method.items() if not found]
    if missing:
        lines += [f"Not evaluated yet: {', '.join(missing)}.", ""]

    # comparisons
    for other in claim.get("passes", []):
        lines += samples_to_pass(other, by_method)
    if "reach" in claim:
        lines += costs_to_reach(claim["reach"], by_method, teacher)
    return "\n".join(lines).rstrip()


def rows_by_method(claim: dict[str, Any], rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each method of a claim, in the claim's order; a list may be empty."""
    by_method = {}
    for method in claim["methods"]:
        by_method[method] = select(rows, "method", method)
    return by_method


def format_tick(value: float, _: Any = None) -> str:
    """Return the text of a tick of an axis."""
    return f"{value:,.3g}" if value < 1000 else f"{value / 1000:,.0f} k"


def plot_methods(axes: Any, by_method: dict[str, list[Row]], over_training: bool) -> None:
    """Plot the FD of each method, a band over the seeds.

    Args:
        axes: to plot on.
        by_method: rows of a claim.
        over_training: plot against evaluations spent, in the method's fewest steps; otherwise
            against the number of steps.
    """
    # a line and a band for each method
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    strong_first = colours[::2] + colours[1::2]
    evaluated = {method: rows for method, rows in by_method.items() if rows}
    for (method, rows), colour in zip(evaluated.items(), strong_first):
        if over_training:
            rows = select(rows, "steps", rows[0]["steps"])
        x = column(rows, "evaluations" if over_training else "steps")
        spreads = list(map(median_and_range, column(rows, "fd")))
        plot_band(axes, x, spreads, method, colour)

    # the axes
    x_label = "evaluations spent" if over_training else "steps"
    axes.set(xscale="log", yscale="log", ylabel="Frechet distance", xlabel=x_label)
    formatted = [axes.yaxis]
    if over_training:
        formatted.append(axes.xaxis)
    else:
        axes.set_xticks(STEP_TICKS, map(str, STEP_TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
    for axis in formatted:
        axis.set_minor_formatter(FuncFormatter(format_tick))
        axis.set_major_formatter(axis.get_minor_formatter())
    low, high = axes.get_xlim()
    if over_training and high > 5 * low:  # there would be too many ticks
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(which="both", labelsize=7)


def plot(claims: dict[str, Any], results: dict[str, Any]) -> bytes:
    """Return the figures as PNG, with a panel for each claim."""
    matplotlib.use("agg")
    height = (len(claims) + 1) // 2
    figure = Figure(figsize=(15, 4.4 * height), layout="constrained")
    panels = figure.subplots(height, 2, squeeze=False).flatten()
    for axes in panels[len(claims) :]:
        axes.set_visible(False)
    for axes, (name, claim) in zip(panels, claims.items()):
        # the methods
        rows = select(results["rows"], "claim", name)
        by_method = rows_by_method(claim, rows)
        plot_methods(axes, by_method, claim.get("trained", False))

        # the teacher
        axes.set_title(f"{name}. {claim['title']}", fontsize=10)
        if name in results["teachers"]:
            teacher = results["teachers"][name]
            label = f"teacher, {teacher['steps']} steps"
            axes.axhline(median_fd(teacher), linestyle=":", color="grey", label=label)
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


class PagePart(NamedTuple):
    """A part of the page."""

    heading: str
    text: str  # below the heading


def page_parts(claims: dict[str, Any], results: dict[str, Any], text: str) -> dict[str, PagePart]:
    """Return the parts of the page, by name.

    There is one for each claim, and one for the toy benchmark if it was run. If it was not, but
    the page has that part, the part names the command that runs it.
    """
    parts = {}
    for name, claim in claims.items():
        heading = f"{name}. {claim['title']}"
        parts[f"claim {name}"] = PagePart(heading, markdown(name, claim, results))
    if "plane" in results:
        parts["plane"] = PagePart(TOY_HEADING, benchmark.markdown(results["plane"]))
    elif BEGIN.format("plane") in text:
        advice = "Not measured yet: `rectify toy benchmark --out RUN/plane`."
        parts["plane"] = PagePart(TOY_HEADING, advice)
    return parts


def report_claims(run: Path, claims: Path, out: Path) -> None:
    """Tabulate a pipeline's results for claims of the field, with costs.

    Each claim has a part of the Markdown file OUT, between two markers; other text is kept.

    Args:
        run: folder of the pipeline, with RUN/evaluation/METHOD/SEED/AT for every evaluated run or
            checkpoint, and perhaps RUN/plane, written by `rectify toy benchmark`.
        claims: YAML file with `claims`, by name. A claim has a `title`, its `methods`, the `steps`
            to compare them at, and its `teacher`. With `trained: true` it has rows for all
            evaluated checkpoints. `passes` names methods: how many samples do the others need to
            reach their final FD? `reach` is a ratio of FDs: what does each method cost until its
            FD in one step is so near to the teacher's? `seeds` selects seeds.
        out: the Markdown file. The figures are written beside it as .json and as a plot, .png.
    """
    # collect the results
    content = read_yaml(claims)
    by_name = check_claims(content, str(claims))
    results = gather(run, by_name)

    # write them
    text = out.read_text() if out.exists() else ""
    for name, part in page_parts(by_name, results, text).items():
        text = replace_part(text, name, part.text, out, f"## {part.heading}")
        print(f"{part.heading}\n\n{part.text}\n")
    write_json(out.with_suffix(".json"), results)
    with atomic_file(out.with_suffix(".png")) as file:
        file.write(plot(by_name, results))
    with atomic_file(out) as file:
        file.write(text.encode())
