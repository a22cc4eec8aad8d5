"""What the stages of a pipeline cost, each by itself and with all that it was made from."""

import os
import re
from pathlib import Path

from data.files import read_json
from data.form import COUNT, conform
from trainer.report.summary import read_stages, run_log


class Costs:
    """What the stages of a pipeline cost, in network evaluations on one sample each.

    Args:
        run: folder of the pipeline.
    """

    def __init__(self, run: Path):
        stages = [stage["words"] for stage in read_stages(run).values()]
        made = {words[words.index("--out") + 1]: " ".join(words) for words in stages if "--out" in words}
        self.run, self.base = run, os.path.commonpath(made) if len(made) > 1 else ""  # where it ran: it may have been moved
        self.texts = {self.place(out): text for out, text in made.items()}
        self.named = {place: re.compile(re.escape(os.path.join(self.base, place)) + r"(?![\w.-])") for place in self.texts}

    def place(self, path: str) -> str:
        """Return a path that a stage was given as one in the pipeline's folder."""
        return os.path.relpath(path, self.base)

    def before(self, place: str) -> set[str]:
        """Return all that a stage's result was made from."""
        found: set[str] = set()
        new = {place}
        while new:
            text = " ".join(self.texts[one] for one in new)
            new = {one for one, name in self.named.items() if name.search(text)} - found - {place}
            found |= new
        return found

    def own(self, place: str, step: int | None = None) -> int:
        """Return what a run or pair set cost by itself, a run until a step, or to its end."""
        log, manifest = self.run / place / "metrics.jsonl", self.run / place / "manifest.json"
        if log.exists():
            lines = [values for values in run_log(log.parent) if "evaluations" in values]
            until = [values for values in lines if step is None or values["step"] <= step]
            conform(until, [{"evaluations": COUNT}], f"{log}: evaluations")
            return until[-1]["evaluations"] if until else 0
        return int(read_json(manifest).get("evaluations", 0)) if manifest.exists() else 0

    def whole(self, place: str, step: int | None = None) -> int:
        """Return what a run cost with all that it was made from, but for teachers: runs that were made from data alone."""
        return self.own(place, step) + sum(self.own(one) for one in self.before(place) if not self.teacher(one))

    def teacher(self, place: str) -> bool:
        """Tell whether a place holds a run that began from nothing and learnt from data alone."""
        taught = re.search(r"--\S*(initial|teacher)", self.texts[place]) or any(self.own(one) for one in self.before(place))
        return (self.run / place / "metrics.jsonl").exists() and not taught
