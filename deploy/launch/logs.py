"""`rectify logs`: what the commands of a run or a stage have printed."""

import re
import time
from pathlib import Path

from deploy.hints import nearest
from deploy.stage_records import GRAPH, read_graph, stage_folder
from deploy.state import State
from deploy.status import read_all

FOLLOW_SECONDS = 1.0
INTERESTING = (State.RUNNING, State.STALLED, State.STOPPING, State.FAILED, State.LOST)


def logs(
    folder: Path,
    stage: str | None = None,
    rank: int = 0,
    lines: int = 50,
    follow: bool = False,
) -> None:
    """Print the end of the newest log of a run, a set or a stage.

    Args:
        folder: of a run, a set or a pipeline.
        stage: of a pipeline; by default the first one that runs or has failed, or else the last.
        rank: whose log.
        lines: lines that are printed; 0 for all.
        follow: print what is added, until it is interrupted.
    """
    if lines < 0 or rank < 0:
        raise ValueError(f"lines is {lines}, and rank is {rank}; both must be at least 0")
    facts = read_all(folder)
    folders = [folder]
    if (folder / GRAPH).exists():
        names = [one.name for one in facts]
        if stage is not None and stage not in names:
            hint = nearest(stage, names) or f"; the stages are {', '.join(names)}"
            raise ValueError(f"--stage {stage}: no such stage{hint}")
        interesting = [one.name for one in facts if one.state in INTERESTING]
        begun = [one.name for one in reversed(facts) if one.attempt]
        chosen = [stage] if stage is not None else interesting or begun or names
        outs = {one.name: one.out for one in read_graph(folder).stages}
        choices = []
        for name in chosen:
            choices.append([stage_folder(folder, name), outs[name] or folder])
        has_logs = [one for one in choices if any((path / "logs").exists() for path in one)]
        folders = [folder, *(has_logs or choices)[0]]
    elif stage is not None:
        raise ValueError(f"--stage {stage}: {folder} is no folder of a pipeline; leave it out")
    path = find_log(folders, rank)
    print(f"==> {path} <==")
    print_end(path, lines, follow)


def find_log(folders: list[Path], rank: int) -> Path:
    """Return the newest log of a rank; the log of a whole stage or job counts as that of rank 0.

    Args:
        folders: where logs may be.
        rank: the rank.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for folder in folders:
        for path in (folder / "logs").glob("*.txt"):
            number = re.search(r"-rank(\d+)$", path.stem)
            if int(number[1] if number else 0) == rank:
                found.append(path)
    if not found:
        raise FileNotFoundError(f"{folders[-1]}: no log of rank {rank} in logs/")
    return max(found, key=lambda path: path.stat().st_mtime)


def print_end(path: Path, lines: int, follow: bool) -> None:
    """Print the last lines of a file, and what is added to it if it is to be followed."""
    with path.open(errors="replace") as file:
        text = file.read().splitlines(True)
        print("".join(text[-lines:] if lines else text), end="", flush=True)
        while follow:
            added = file.read()
            print(added, end="", flush=True)
            time.sleep(FOLLOW_SECONDS)
