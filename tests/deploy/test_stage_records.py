"""What `rectify run` runs again: stages whose inputs have changed, or whose files have."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.files import file_checksum, read_json, write_json
from deploy import stage_records
from deploy.pipeline import load
from deploy.stage_records import find_records, record_files, write_graph
from tests.helpers.commands import REPOSITORY, Workspace, run_command
from tests.helpers.pipelines import FakeCommands, write_pipeline
from tests.helpers.refusals import assert_refused


@pytest.fixture
def commands(monkeypatch) -> FakeCommands:
    """Replace the commands of stages by one that writes a file into the stage's folder."""
    return FakeCommands(monkeypatch)


class Chain:
    """A pipeline first -> second -> third, and `apart`, which needs nothing."""

    def __init__(self, folder: Path, commands: FakeCommands):
        self.folder = folder
        self.commands = commands
        self.out = folder / "out"
        (folder / "second.yaml").write_text("net: {width: 8}\n")
        (folder / "prompts.txt").write_text("a cat\n")
        self.stages: dict[str, dict[str, Any]] = {
            "first": {"pack": {"size": 8}, "needs": []},
            "apart": {"pack": {"images": str(folder / "prompts.txt")}, "needs": []},
            "second": {"pack": {"config": str(folder / "second.yaml")}, "needs": ["first"]},
            "third": {"pack": {"images": "{out}/second"}, "needs": ["second"]},
        }
        for name, stage in self.stages.items():
            stage["pack"]["out"] = f"{{out}}/{name}"

    def write(self) -> Path:
        """Write the pipeline's file."""
        stages = [{"name": name, **stage} for name, stage in self.stages.items()]
        return write_pipeline(self.folder / "x.yaml", stages)

    def run(self, *words: object) -> list[str]:
        """Run the pipeline; return the stages that began."""
        self.commands.begun.clear()
        assert run_command("run", self.write(), *words) == 0
        return list(self.commands.begun)


@pytest.fixture
def chain(tmp_path, commands) -> Chain:
    """Return a finished pipeline."""
    chain = Chain(tmp_path, commands)
    assert chain.run() == ["first", "apart", "second", "third"]
    return chain


def change_option(chain: Chain) -> None:
    chain.stages["second"]["pack"]["size"] = 16


def change_yaml(chain: Chain) -> None:
    (chain.folder / "second.yaml").write_text("net: {width: 9}\n")


def change_prompts(chain: Chain) -> None:
    (chain.folder / "prompts.txt").write_text("a dog\n")


def change_first(chain: Chain) -> None:
    chain.stages["first"]["pack"]["size"] = 16


CHANGES = [
    (change_option, ["second", "third"], ("stage second", "size", "'16'", "None")),
    (change_yaml, ["second", "third"], ("second.yaml.net.width", "is 9", "was 8")),
    (change_prompts, ["apart"], ("stage apart", "prompts.txt")),
    (change_first, ["first", "second", "third"], ("stage first", "size", "'16'", "'8'")),
]


@pytest.mark.parametrize(("change", "again", "named"), CHANGES, ids=lambda item: str(item)[10:24])
def test_a_change_runs_its_stage_and_its_dependents_again(
    chain, capfd, change: Callable[[Chain], None], again, named
):
    change(chain)
    config = chain.write()
    before = {path: path.read_bytes() for path in chain.out.rglob("*") if path.is_file()}
    wanted = (chain.out, *again, "--force", "--out", *named)
    line = assert_refused(capfd, ("run", config), *wanted, alone=True)
    assert not [name for name in chain.stages.keys() - {*again} if f"stage {name}" in line]
    assert before == {path: path.read_bytes() for path in before}
    capfd.readouterr()
    assert run_command("run", config, "--dry-run") == 0
    assert capfd.readouterr().out.count("has changed") == len(again)

    # With --force they run again; what they had made is kept.
    assert chain.run("--force") == again
    for name in again:
        (kept,) = (chain.out / "stages" / name / "earlier").glob(f"*/{name}/result.txt")
        assert kept.read_bytes() == before[chain.out / name / "result.txt"]
    assert chain.run() == []


def test_what_means_the_same_changes_nothing(chain):
    (chain.folder / "second.yaml").write_text("# a comment\nnet:\n  width: 8  # wide\n")
    chain.stages["second"]["needs"] = "first"
    chain.stages["apart"].pop("needs")  # it still comes after `first`, which it would now need
    chain.stages = {"apart": chain.stages["apart"], **chain.stages}
    chain.stages["third"]["resources"] = {"nodes": 1}
    assert chain.run() == []


def test_an_inserted_stage_that_nothing_needs_changes_nothing(chain):
    new = {"pack": {"out": "{out}/new"}, "needs": ["first"]}
    chain.stages = {"first": chain.stages["first"], "new": new, **chain.stages}
    assert chain.run() == ["new"]
    assert chain.run() == []
    assert sorted(find_records(chain.out)) == ["apart", "first", "new", "second", "third"]


def test_the_folder_may_be_named_in_another_way_or_moved(chain, monkeypatch):
    monkeypatch.chdir(chain.folder)
    assert chain.run("--out", "out") == []
    chain.out.rename(chain.folder / "moved")
    assert chain.run("--out", "moved") == []
    assert not chain.out.exists()


@pytest.mark.parametrize("kind", ["set", "run", "model"])
def test_a_changed_folder_outside_is_a_change(chain, capfd, kind):
    files = {"set": "manifest.json", "run": "checkpoints/step=1.ckpt", "model": "model_index.json"}
    more = {"set": "manifest.json", "run": "checkpoints/step=2.ckpt", "model": "model_index.json"}
    outside = chain.folder / "outside"
    for path, text in ((files[kind], "1"), (more[kind], "2")):
        (outside / path).parent.mkdir(parents=True, exist_ok=True)
        (outside / path).write_text(text)
        chain.stages["third"]["pack"]["images"] = ["x", str(outside)]
        if text == "1":
            assert chain.run("--force") == ["third"]
    assert_refused(capfd, ("run", chain.write()), "stage third", outside, "--force")
    assert chain.run("--force") == ["third"]


def test_a_file_that_a_configuration_names_is_read_too(chain, capfd):
    (chain.folder / "net.yaml").write_text("width: 8\n")
    (chain.folder / "second.yaml").write_text(f"net: {chain.folder}/net.yaml\nday: 2026-01-01\n")
    assert chain.run("--force") == ["second", "third"]
    (chain.folder / "net.yaml").write_text("width: 9\n")
    assert_refused(capfd, ("run", chain.write()), "stage second", "net.yaml.width", "9", "8")


def test_what_a_stage_makes_outside_the_folder_is_no_input(chain):
    """Neither of itself nor of a later stage, also if a configuration names it."""
    elsewhere = chain.folder / "elsewhere"
    chain.stages["second"]["pack"]["out"] = str(elsewhere)
    (chain.folder / "second.yaml").write_text(f"out: {elsewhere}\n")
    chain.stages["third"]["pack"]["images"] = str(elsewhere)
    chain.commands.act = {"elsewhere": lambda: write_set(elsewhere, {})}
    chain.run("--force")
    assert chain.run() == []
    (chain.folder / "second.yaml").write_text(f"out: {elsewhere}\nx: 1\n")
    assert chain.run("--force") == ["elsewhere", "third"]
    assert (chain.folder / "elsewhere.earlier-1/result.txt").exists()


def test_a_stage_that_is_refused_binds_nothing(chain, capfd):
    chain.stages["fourth"] = {"pack": {"out": "{out}/fourth", "size": "many"}}
    chain.commands.codes = {"fourth": 2}
    with pytest.raises(SystemExit, match="2"):
        chain.run()
    chain.commands.codes = {}
    chain.stages["fourth"]["pack"]["size"] = 8
    assert chain.run() == ["fourth"]


@pytest.mark.parametrize("code", [1, 3, 75, 137])
def test_a_stage_that_has_left_files_is_bound(chain, capfd, code):
    """One that failed before that is not: whatever it is run with next, nothing is lost."""
    chain.stages["fourth"] = {"pack": {"out": "{out}/fourth", "size": 4}}
    chain.commands.codes = {"fourth": code}
    for act in (lambda: None, lambda: write_set(chain.out / "fourth", {"0.tar": b"x"})):
        chain.commands.act = {"fourth": act}
        chain.stages["fourth"]["pack"]["size"] -= 1
        with pytest.raises(SystemExit, match=str(code)):
            chain.run()
    chain.stages["fourth"]["pack"]["size"] = 8
    assert_refused(capfd, ("run", chain.write()), "stage fourth", "begun", "size", "'8'", "'2'")
    chain.commands.codes = {}
    assert chain.run("--force") == ["fourth"]


@pytest.mark.parametrize("moment", ["rename", "unlink", "write_json"])
def test_a_kill_in_between_loses_nothing(chain, capfd, monkeypatch, moment):
    """It ends after the folder was renamed, the record removed or the new inputs written."""
    content = (chain.out / "second/result.txt").read_bytes()
    change_option(chain)
    owner: Any = stage_records if moment == "write_json" else Path
    original = getattr(owner, moment)

    def end_after(*args: Any) -> None:
        original(*args)
        if "second" in str(args[0]):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, end_after)
        assert run_command("run", chain.write(), "--force") == 130
    assert chain.run("--force") == ["second", "third"]
    (kept,) = (chain.out / "stages/second/earlier").glob("*/second/result.txt")
    assert kept.read_bytes() == content


def test_a_report_does_not_read_what_was_renamed(chain):
    """No folder of results is left beside the new one, where reports look for them."""
    change_first(chain)
    chain.run("--force")
    assert sorted(path.name for path in chain.out.iterdir() if path.is_dir()) == [
        *("apart", "first", "second", "stages", "third"),
    ]


# Files that have changed.


def write_set(folder: Path, shards: dict[str, bytes]) -> None:
    """Write a set's tars and its manifest, as far as a re-check reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, content in shards.items():
        (folder / name).write_bytes(content)
        entries.append({"name": name, "xxh3": file_checksum(folder / name)})
    write_json(folder / "manifest.json", {"shards": entries})


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(path, (2, 2))


FILES = {
    "touched": (touch, []),
    "missing": (Path.unlink, ["second"]),
    "truncated": (truncate, ["second"]),
    "rewritten": (rewrite, ["second"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_has_changed(chain, capfd, kind):
    """A new time alone is no change; other changes run the stage, and nothing after it, again."""
    change, again = FILES[kind]
    path = chain.out / "second/result.txt"
    content = path.read_bytes()
    change(path)
    assert chain.run() == again
    assert path.read_bytes() == content
    kept = path.with_name("result.txt.earlier-1")
    assert kept.exists() == (kind == "rewritten")
    if kind == "touched":  # the next time it is not read
        record = read_json(find_records(chain.out)["second"])
        assert record["files"]["second/result.txt"][1] == path.stat().st_mtime_ns
    assert chain.run() == []


def test_a_missing_folder_is_made_again(chain, capfd):
    shutil.rmtree(chain.out / "second")
    assert run_command("run", chain.write(), "--dry-run") == 0
    assert "second/result.txt is missing" in capfd.readouterr().out
    assert chain.run() == ["second"]


def test_logs_and_signs_of_life_are_no_results(chain):
    (chain.out / "second/logs").mkdir()
    for name in ("heartbeat.json", "lease.json", "logs/0001-rank00.txt"):
        (chain.out / "second" / name).write_text("x")
    pipeline = load(chain.write())
    second = next(one for one in pipeline.stages if one.name == "second")
    assert list(record_files(pipeline, second)) == ["second/result.txt"]


def test_a_folder_inside_another_one_belongs_to_its_stage(chain):
    chain.stages["third"]["pack"]["out"] = "{out}/second/third"
    chain.run("--force")
    assert chain.run() == []
    rewrite(chain.out / "second/third/result.txt")
    assert chain.run() == ["third"]


def test_a_copy_without_times_is_not_made_again(chain, monkeypatch):
    """Files are read. Large tars are known by their manifests; other large files by their time."""
    monkeypatch.setattr(stage_records, "HASHED_BYTES", 1000)
    shard = b"x" * 2000
    chain.commands.act = {"second": lambda: write_set(chain.out / "second", {"0.tar": shard})}
    change_option(chain)
    chain.run("--force")
    chain.out.rename(chain.folder / "original")
    subprocess.run(["cp", "-r", chain.folder / "original", chain.out], check=True)
    assert chain.run() == []
    touch(chain.out / "second/0.tar")
    assert chain.run() == []
    rewrite(chain.out / "second/0.tar")
    assert chain.run() == ["second"]


def test_a_record_without_inputs_is_of_an_older_version(chain, capfd):
    """The stage's command runs again if it is the same, and is refused if it is not."""
    for name, path in find_records(chain.out).items():
        record = read_json(path)
        write_json(path, {"words": record["words"], "fingerprint": "x", "seconds": 1.0})
        shutil.rmtree(chain.out / "stages" / name)
    chain.stages["third"]["pack"]["size"] = 3
    chain.stages["third"]["pack"]["batch"] = 3
    assert_refused(capfd, ("run", chain.write()), "stage third", "finished", "--force")
    del chain.stages["third"]["pack"]["size"], chain.stages["third"]["pack"]["batch"]
    assert chain.run() == ["first", "apart", "second", "third"]


@pytest.mark.parametrize("name", ["stages/03-second.json", "stages/second/begun.json"])
@pytest.mark.parametrize("content", ["{", "{}", '{"a": 1}', "[]", ""])
def test_a_damaged_record_is_named(chain, capfd, name, content):
    (chain.out / name).write_text(content)
    if name.endswith("begun.json"):
        (chain.out / "stages/03-second.json").unlink()
    assert_refused(capfd, ("run", chain.write()), name, alone=True)
    (chain.out / name).unlink()
    assert chain.run() == ["second"]


@pytest.mark.parametrize("content", [{}, {"fingerprint": 1, "inputs": {}}])
def test_a_record_with_other_entries_is_named(chain, capfd, content):
    (chain.out / "stages/03-second.json").unlink()
    write_json(chain.out / "stages/second/begun.json", content)
    assert_refused(capfd, ("run", chain.write()), "begun.json", alone=True)


@pytest.mark.parametrize("entry", [[], [1, 2], [1, 2, None, 3], 7, "x", [1.5, 2, None]], ids=str)
def test_a_record_of_files_with_other_entries_is_named(chain, capfd, entry):
    path = chain.out / "stages/03-second.json"
    record = read_json(path)
    write_json(path, {**record, "files": {**record["files"], "second/result.txt": entry}})
    named = (path, "files", "second/result.txt")
    assert_refused(capfd, ("run", chain.write()), *named, alone=True)


SHARDS = 10_000
PROGRAM = """
import resource, sys
from deploy.cli import main
code = main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
print(code, "torch" in sys.modules, usage.ru_utime + usage.ru_stime)
"""


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """Write a finished pipeline of 8 stages with 10,000 shards of three files; return its file."""
    monkeypatch.setattr(stage_records, "file_checksum", lambda path: "0" * 32)
    stages = [
        {"name": f"set-{i}", "pack": {"out": f"{{out}}/{i}", "config": str(tmp_path / "c.yaml")}}
        for i in range(8)
    ]
    (tmp_path / "c.yaml").write_text("net: {width: 8}\n")
    pipeline = load(write_pipeline(tmp_path / "x.yaml", stages))
    for stage in pipeline.stages:
        assert stage.out
        stage.out.mkdir(parents=True)
        entries = []
        for number in range(SHARDS // 8):
            name = f"{number:06d}"
            for suffix in ("tar", "json", "npy"):
                os.mknod(f"{stage.out}/{name}.{suffix}")
            entries.append({"name": f"{name}.tar", "xxh3": "0" * 32})
        write_json(stage.out / "manifest.json", {"shards": entries})
        stage_records.write_record(pipeline, stage, 1.0)
    write_graph(pipeline.out, pipeline)
    return tmp_path / "x.yaml"


def test_a_finished_pipeline_is_checked_quickly(large, tmp_path):
    """Less than 2 s of CPU for 10,000 shards, and torch is not imported."""
    words = [sys.executable, "-c", PROGRAM, "run", str(large)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    code, has_torch, seconds = done.stdout.split()[-3:]
    assert done.stderr.count("finished") == 8, done.stderr
    assert (code, has_torch) == ("0", "False")
    assert float(seconds) < 2
    print(f"{seconds} s of CPU")

    # A missing shard is found.
    (tmp_path / "out/5/000700.tar").unlink()
    words = [sys.executable, "-m", "deploy", "run", str(large), "--dry-run"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "out/5/000700.tar is missing" in done.stdout


@pytest.mark.slow
def test_real_sets_are_made_again_where_they_were_damaged(tmp_path):
    """A shard of packed digits that is missing, truncated or damaged comes back, bit for bit."""
    workspace = Workspace(tmp_path)
    stage = {"name": "pack", "pack": {"out": "{out}/images", "size": 8}}
    write_pipeline(tmp_path / "x.yaml", [stage])
    workspace.rectify("run", "x.yaml")
    shard = sorted((tmp_path / "out/images").rglob("*.tar"))[0]
    content = shard.read_bytes()
    for change in (Path.unlink, truncate, rewrite):
        change(shard)
        assert ": done" in workspace.rectify("run", "x.yaml").stderr
        assert shard.read_bytes() == content, change


def test_the_pipeline_of_the_demo_is_finished_elsewhere(workspace, tmp_path, capfd, monkeypatch):
    """A copy without times in another folder: only what is large and in no set is looked at."""
    monkeypatch.chdir(workspace.path)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", "runs/demo", copy], check=True)
    words = ("run", "configs/digits/pipeline.yaml", "--smoke", "--dry-run", "--out", copy)
    assert run_command(*words) == 0
    out = capfd.readouterr().out
    assert out.count(": finished") == 10, out


def test_the_records_hold_the_words_of_every_stage(chain):
    records = {name: read_json(path)["words"] for name, path in find_records(chain.out).items()}
    assert records["third"] == [
        *("pack", "--images", f"{chain.out}/second", "--out", f"{chain.out}/third"),
    ]
    assert yaml.safe_load((chain.out / "pipeline.yaml").read_text())["out"] == str(chain.out)


def test_new_photos_are_another_input(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"a")
    options = {"images": str(photos), "out": "{out}/images"}
    config = write_pipeline(tmp_path / "x.yaml", [{"name": "pack", "pack": options}])
    before = load(config).stages[0].fingerprint
    assert load(config).stages[0].fingerprint == before
    (photos / "b.png").write_bytes(b"b")
    assert load(config).stages[0].fingerprint != before


def test_a_file_in_the_pipelines_folder_is_an_input_if_no_stage_makes_it(tmp_path):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out/more.yaml"
    file.write_text("a: 1")
    fit = {"config": str(file), "out": "{out}/run"}
    config = write_pipeline(tmp_path / "x.yaml", [{"name": "fit", "fit": fit}])
    before = load(config).stages[0].fingerprint
    file.write_text("a: 2")
    assert load(config).stages[0].fingerprint != before


def test_a_fit_without_out_has_that_of_its_configuration(tmp_path):
    (tmp_path / "base.yaml").write_text("out: here")
    (tmp_path / "more.yaml").write_text("out: runs/x")
    configs = [str(tmp_path / name) for name in ("base.yaml", "more.yaml")]
    stages = [{"name": "fit", "fit": {"config": configs}}]
    (stage,) = load(write_pipeline(tmp_path / "x.yaml", stages)).stages
    assert stage.words[-2:] == ["--out", "runs/x"]
