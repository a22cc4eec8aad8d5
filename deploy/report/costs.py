"""What a run or a pair set of a pipeline cost: by itself, and with everything it was made from."""

import os
import re
from pathlib import Path

from data.files import read_json
from data.schema import COUNT, check_schema
from deploy.report.summary import read_stages, run_log


class Costs:
    """The costs of a pipeline's results, in evaluations of a network on one sample.

    A result is named by its folder, relative to the pipeline's, e.g. "student/0".

    Args:
        run: folder of the pipeline.
    """

    def __init__(self, run: Path):
        # the command that made each result
        commands: dict[str, str] = {}
        for stage in read_stages(run).values():
            words = stage["words"]
            if "--out" in words:
                commands[words[words.index("--out") + 1]] = " ".join(words)

        self.run = run
        # The folder in which the pipeline ran: it may have been moved since.
        self.original_folder = os.path.commonpath(commands) if len(commands) > 1 else ""
        self.commands = {}
        self.patterns = {}
        for out, text in commands.items():
            name = self.name_of(out)
            path = os.path.join(self.original_folder, name)
            self.commands[name] = text
            self.patterns[name] = re.compile(re.escape(path) + r"(?![\w.-])")

    def name_of(self, path: str) -> str:
        """Return the name of a path that a stage's command contains."""
        return os.path.relpath(path, self.original_folder)

    def inputs(self, name: str) -> set[str]:
        """Return the names of all results that a result was made from, directly or not."""
        found: set[str] = set()
        new = {name}
        while new:
            text = " ".join(map(self.commands.__getitem__, new))
            mentioned = {one for one, pattern in self.patterns.items() if pattern.search(text)}
            new = mentioned - found - {name}
            found |= new
        return found

    def direct(self, name: str, step: int | None = None) -> int:
        """Return what a run or a pair set cost by itself.

        Args:
            name: of the result.
            step: count a run only until this training step.
        """
        log = self.run / name / "metrics.jsonl"
        manifest = self.run / name / "manifest.json"
        if log.exists():
            lines = []
            for values in run_log(log.parent):
                if "evaluations" in values and (step is None or values["step"] <= step):
                    lines.append(values)
            check_schema(lines, [{"evaluations": COUNT}], f"{log}: evaluations")
            return lines[-1]["evaluations"] if lines else 0
        if manifest.exists():
            return int(read_json(manifest).get("evaluations", 0))
        return 0

    def total(self, name: str, step: int | None = None) -> int:
        """Return what a run cost with everything it was made from, except its teachers."""
        total = self.direct(name, step)
        for one in self.inputs(name):
            if not self.is_teacher(one):
                total += self.direct(one)
        return total

    def is_teacher(self, name: str) -> bool:
        """Whether a result is a run that was trained from random weights on data alone."""
        if not (self.run / name / "metrics.jsonl").exists():
            return False
        if re.search(r"--\S*(initial|teacher)", self.commands[name]):
            return False
        return not any(map(self.direct, self.inputs(name)))
