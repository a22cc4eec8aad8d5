"""Slurm as an engine, by its command line: sbatch, squeue, scontrol, scancel.

Its REST service and its JSON differ in each release; these options do not.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.files import atomic_file
from data.schema import check_schema
from deploy.launch.engine import EngineSilent, JobFacts, Task
from deploy.launch.resources import Resources
from deploy.state import Engine

ANSWER_SECONDS = 60  # that a command of Slurm may take
# What Slurm's commands print if its controller, or their way to it, is gone.
SILENT = re.compile(
    r"(?i)unable to contact|connect(ion)? (failure|refused|timed out)|timed? ?out|zero bytes"
    r"|munge|credential|slurm_load_jobs error: (?!invalid job id)"
)
UNKNOWN_JOB = re.compile(r"(?i)invalid job id")
STATES = {
    Engine.QUEUED: ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
    Engine.RUNNING: ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"),
    Engine.CANCELLED: ("CANCELLED", "REVOKED"),
}
SLURM_VARIABLES = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SALLOC_", "SRUN_", "SACCT_")
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
# Options of sbatch that are set here.
SET_OPTIONS = (
    *("job-name", "chdir", "output", "error", "open-mode", "export", "export-file", "requeue"),
    *("no-requeue", "kill-on-invalid-dep", "signal", "nodes", "cpus-per-task", "array", "mem"),
    *("gpus-per-node", "time", "dependency", "parsable", "test-only", "wait", "wrap", "ntasks"),
    *("ntasks-per-node", "clusters", "help", "usage", "version"),
)
OPTIONS_SCHEMA: dict[str, Any] = {
    "partition": str,
    "account": str,
    "qos": str,
    "constraint": str,
    "options": [re.compile(r"--\S.*")],
    "container": re.compile("pyxis|apptainer"),
}


class Slurm:
    """Slurm. Its entries in resources.engines.slurm are partition, account, qos, constraint,
    `options` of sbatch, and `container`: what runs resources.container, pyxis or apptainer.
    """

    name = "slurm"
    keeps_graph = True

    def check(self) -> None:
        """Check that Slurm's commands are installed.

        Raises:
            ValueError: they are not.
        """
        for program in ("sbatch", "squeue", "scontrol", "scancel"):
            if shutil.which(program) is None:
                raise ValueError(
                    f"{program}: not found; launch from a login node of the cluster, or install "
                    "Slurm's commands (Debian: slurm-client)"
                )

    def render(self, task: Task, after: Sequence[str] = (), anyhow: bool = False) -> str:
        """Return the batch script. See `JobEngine.render`."""
        resources = task.resources
        settings = read_options(resources)
        logs = str(task.folder.absolute() / "logs").replace("%", "%%")  # % begins a pattern
        log = "job-%A_%a.txt" if task.workers else "job-%j.txt"
        options = {
            "job-name": task.name,
            "chdir": os.getcwd(),
            "output": f"{logs}/{log}",
            "open-mode": "append",
            "export": "NONE",
            "requeue": None,
            "kill-on-invalid-dep": "yes",
            "signal": f"B:USR1@{resources.grace}",
            "nodes": "1" if task.workers else str(resources.nodes),
            # One task with the cores of a node: with its number of processes, Slurm would give a
            # range of nodes too few.
            "cpus-per-task": str(resources.cpus * resources.processes),
        }
        if task.workers:
            options["array"] = f"0-{task.workers - 1}"
        if resources.gpus:
            options["gpus-per-node"] = str(resources.gpus)
        if resources.memory is not None:
            options["mem"] = str(resources.memory)
        if resources.time is not None:
            options["time"] = str(resources.time)
        for key in ("partition", "account", "qos", "constraint"):
            if key in settings:
                options[key] = settings[key]
        if after:
            kind = "afterany" if anyhow else "afterok"
            options["dependency"] = f"{kind}:{':'.join(after)}"

        # the script; Slurm reads its options as a shell would
        lines = ["#!/bin/bash"]
        for key, value in options.items():
            text = f"--{key}" if value is None else f"--{key}={value}"
            lines.append(f"#SBATCH {quote_directive(text)}")
        lines += [f"#SBATCH {option}" for option in settings.get("options", [])]
        command = shlex.join([sys.executable, "-P", "-m", "deploy", *task.words])
        return "\n".join([*lines, "", f"exec {command}", ""])

    def check_fit(self, task: Task) -> None:
        """Check that the cluster could ever run a task. See `JobEngine.check_fit`."""
        script = self.render(task)
        done = call(["sbatch", "--test-only"], script)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason"
            reason = reason.removeprefix("sbatch: error: ").removeprefix("allocation failure: ")
            raise ValueError(f"{task.name}: resources: Slurm refuses them: {reason}")

    def submit(self, task: Task, after: Sequence[str] = (), anyhow: bool = False) -> str:
        """Submit a task, and return its id. See `JobEngine.submit`."""
        script = self.render(task, after, anyhow)
        (task.folder / "logs").mkdir(parents=True, exist_ok=True)
        with atomic_file(task.folder / f"{Path(task.record).stem}.sh") as file:
            file.write(script.encode())
        done = call(["sbatch", "--parsable"], script)
        if done.returncode:
            text = done.stderr.strip().removeprefix("sbatch: error: ")
            raise ValueError(f"{task.name}: sbatch: {text}")
        job = done.stdout.strip().partition(";")[0]
        if not job.isdecimal():
            raise ValueError(f"{task.name}: sbatch printed {job!r} instead of a job's id")
        return job

    def find(self, name: str) -> str | None:
        """Return the id of the newest job with a name; None if there is none."""
        words = ["squeue", "--states=all", "--noheader", f"--name={name}", "--format=%F"]
        found = call(words).stdout.split()
        return max(found, key=int) if found else None

    def query(self, ids: Sequence[str]) -> dict[str, JobFacts]:
        """Return what is known of jobs; an array counts as one."""
        words = ["squeue", "--states=all", "--noheader", "--array", f"--jobs={','.join(ids)}"]
        done = call([*words, "--format=%F|%T|%r|%N"], accepted=UNKNOWN_JOB)
        tasks: dict[str, list[JobFacts]] = {job: [] for job in ids}
        for line in done.stdout.splitlines():
            job, state, reason, hosts = line.split("|")
            if job in tasks:
                is_ending = state == "COMPLETING"
                reason = "" if reason == "None" else reason
                tasks[job].append(JobFacts(translate_state(state), reason, hosts, is_ending))
        known = {job: combine_tasks(facts) for job, facts in tasks.items() if facts}
        return {job: known.get(job) or query_accounting(job) for job in ids}

    def stop(self, job: str) -> None:
        """Send SIGUSR1 to a running job; cancel one that waits. See `JobEngine.stop`."""
        check_success(["scancel", "--batch", "--signal=USR1", "--state=RUNNING", job])
        check_success(["scancel", "--state=PENDING", job])

    def cancel(self, job: str) -> None:
        """Cancel a job: Slurm sends SIGTERM, and later SIGKILL."""
        check_success(["scancel", job])


def read_options(resources: Resources) -> dict[str, Any]:
    """Return Slurm's part of a stage's resources.

    Raises:
        ValueError: an entry is unknown or wrong.
    """
    settings = resources.engines.get("slurm", {})
    check_schema(settings, dict, "resources: engines: slurm")
    for key, value in settings.items():
        if key not in OPTIONS_SCHEMA:
            raise ValueError(
                f"resources: engines: slurm: no entry `{key}`; the entries are "
                f"{', '.join(OPTIONS_SCHEMA)}"
            )
        check_schema(value, OPTIONS_SCHEMA[key], f"resources: engines: slurm: {key}")
    for option in settings.get("options", []):
        name = option.removeprefix("--").partition("=")[0].split()[0]
        if any(one.startswith(name) for one in SET_OPTIONS):  # Slurm accepts shortened names
            raise ValueError(
                f"resources: engines: slurm: options: {option} is set by `rectify launch`; leave "
                "it out"
            )
    if resources.volumes and not resources.container:
        raise ValueError("resources: volumes: are for a container; give `container`, too")
    if resources.container and "container" not in settings:
        raise ValueError(
            "resources: container: engines.slurm.container is missing; it is what runs the image "
            "on this cluster: pyxis or apptainer"
        )
    return settings


def launcher_words(resources: Resources, nodes: int) -> list[str]:
    """Return the words before a stage's command inside a job, which start its processes.

    Args:
        resources: of the stage.
        nodes: on each of which processes run, one for each GPU; 0 for one process.
    """
    # When a process has ended, others that wait for it without end are killed in the end.
    words = ["srun", "--export=ALL", f"--wait={resources.grace}", "--unbuffered"]
    words.append(f"--cpus-per-task={resources.cpus}")
    processes = resources.processes if nodes else 1
    words += [f"--nodes={max(1, nodes)}", f"--ntasks-per-node={processes}"]
    settings = read_options(resources)
    if settings.get("container") == "pyxis":
        words.append(f"--container-image={resources.container}")
        if resources.volumes:
            words.append(f"--container-mounts={','.join(resources.volumes)}")
    if settings.get("container") == "apptainer":
        words += ["apptainer", "exec", *(["--nv"] if resources.gpus else [])]
        words += [f"--bind={volume}" for volume in resources.volumes]
        words.append(str(resources.container))
    return words


def is_running_normally(job: str) -> bool:
    """Whether a job, asked from inside, is neither cancelled nor at its end: it may be requeued."""
    done = call(["scontrol", "show", "job", "-o", job])
    found = re.search(r"\bJobState=(\w+)", done.stdout)
    return found is not None and found[1] == "RUNNING"


def requeue(job: str) -> None:
    """Put the job that this process belongs to into the queue again.

    Raises:
        ValueError: Slurm refuses.
        EngineSilent: it does not answer.
    """
    done = call(["scontrol", "requeue", job])
    if done.returncode:
        raise ValueError(f"scontrol requeue {job}: {done.stderr.strip()}")


def call(
    words: Sequence[str], script: str | None = None, accepted: re.Pattern[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm, and return what it printed.

    Args:
        words: the command.
        script: its input.
        accepted: an error that is an answer.

    Raises:
        EngineSilent: Slurm does not answer.
        ValueError: the command is not installed.
    """
    try:
        done = subprocess.run(
            words,
            input=script,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            env=clean_environment(),
        )
    except subprocess.TimeoutExpired:
        raise EngineSilent(f"slurm: no answer to {words[0]} in {ANSWER_SECONDS} s") from None
    except FileNotFoundError:
        raise EngineSilent(f"slurm: {words[0]} is not installed on this machine") from None
    is_accepted = accepted is not None and accepted.search(done.stderr)
    if done.returncode and not is_accepted and SILENT.search(done.stderr):
        raise EngineSilent(f"slurm: {done.stderr.strip().splitlines()[-1]}")
    return done


def query_accounting(job: str) -> JobFacts:
    """Return what Slurm's accounting, if there is one, knows of a job that has left the queue."""
    words = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}"]
    if shutil.which("sacct") is None:
        return JobFacts(Engine.ENDED)
    states = call([*words, "--format=State"]).stdout.split("\n")
    facts = [JobFacts(translate_state(state.partition(" ")[0])) for state in states if state]
    return combine_tasks(facts)


def check_success(words: Sequence[str]) -> None:
    """Run a command of Slurm.

    Raises:
        EngineSilent: Slurm does not answer.
        ValueError: it refuses.
    """
    done = call(words)
    if done.returncode:
        raise ValueError(f"{words[0]}: {done.stderr.strip()}")


def clean_environment() -> dict[str, str]:
    """Return the environment without variables that change what Slurm's commands do.

    Those of a shell inside another job would even become those of the new job.
    """
    kept = {}
    for name, value in os.environ.items():
        if name in KEPT_VARIABLES or not name.startswith(SLURM_VARIABLES):
            kept[name] = value
    return kept


def translate_state(state: str) -> Engine:
    """Return our word for a state of Slurm."""
    for engine, states in STATES.items():
        if state in states:
            return engine
    return Engine.ENDED


def combine_tasks(facts: Sequence[JobFacts]) -> JobFacts:
    """Return what is known of an array: that a task runs, else that one waits, else its end."""
    for state in (Engine.RUNNING, Engine.QUEUED):
        found = [one for one in facts if one.state is state]
        if found:
            hosts = ",".join(dict.fromkeys(one.hosts for one in found if one.hosts))
            return JobFacts(state, found[0].reason, hosts, any(one.is_ending for one in found))
    if facts and all(one.state is Engine.CANCELLED for one in facts):
        return facts[0]
    return JobFacts(Engine.ENDED, facts[-1].reason if facts else "")


def quote_directive(text: str) -> str:
    """Return an option as a script's #SBATCH line has it.

    Raises:
        ValueError: it has a character that Slurm cannot read.
    """
    if re.search(r"[\n\"\\]", text):
        raise ValueError(f"{text!r}: a path with quotes, backslashes or line breaks; rename it")
    return f'"{text}"' if re.search(r"[\s'#]", text) else text
