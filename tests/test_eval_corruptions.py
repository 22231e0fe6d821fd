"""A thousand damaged downloads, configs and manifests.

Each ends in a clear `UserError`, an exception that names the file, or an honest count; never in a wrong number, and
never with lost data.
"""

import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import traceback
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from eval_datasets import CONFIGS, MODALITIES, InstantModel, with_counts
from lookalikes import FOLDERS, LOOKALIKES

from languagebind._yaml import PlainLoader
from languagebind.config import UserError
from languagebind.eval import load_dataset_config
from languagebind.eval.evaluate import evaluate
from languagebind.eval.prepare.__main__ import PrepareConfig, prepare

RUNS = 40  # of each of the 27 look-alikes
SECONDS = 10  # of processor time: a run that takes as long hangs; so does one that takes six times as long by the clock
CASES = [(name, LOOKALIKES) for name in LOOKALIKES] + [(name, FOLDERS) for name in FOLDERS]
TABLES = (".csv", ".txt", ".json", ".jsonl", ".pkl", ".xml", ".mat")
ABSURD = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", " ", "x", "é", "e\u0301", "\0", "\ud800", "a/../../b",
          "x" * 400, [], {}, [[]], [None], {"a": 1}, ["x", "x"]]  # fmt: skip


class Hangs(BaseException):
    """Not an Exception: whoever catches those should not catch this."""


# ------------------------------------------------------------------------------------------------- corruptions


def gone(path: Path, rng: random.Random) -> None:
    path.unlink()


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 8, 64)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zeros(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    start = rng.randrange(len(data) + 1)
    path.write_bytes(data[:start] + bytes(rng.choice((1, 100))) + data[start:])


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path, rng: random.Random) -> None:
    """A link to itself in place of the file, or links to the folders above beside it."""
    if rng.random() < 0.3:
        path.unlink()
        path.symlink_to(path)
        return
    for k in rng.sample(range(9), 3):
        if not (link := path.parent / f"again{k}").is_symlink():
            link.symlink_to(rng.choice(path.parents[:2]))


def encoded(path: Path, rng: random.Random) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    path.write_bytes((text + "é").encode(rng.choice(("latin-1", "utf-16", "utf-8-sig", "utf-32")), "replace"))


def renamed(path: Path, rng: random.Random) -> None:
    form = rng.choice(("NFC", "NFD"))
    path.rename(path.with_name(unicodedata.normalize(form, rng.choice(("é", "Å", "")) + path.stem) + path.suffix))


def twin(path: Path, rng: random.Random) -> None:
    shutil.copy(path, path.with_suffix(rng.choice((".wav", ".mp4", ".txt", ".png"))).with_stem(path.stem + "é"))
    if (other := path.with_suffix(".bak")) != path:
        shutil.copy(path, other)


def rows(path: Path, rng: random.Random) -> None:
    """A line that is there twice, lost, joined to the next, or has a column or a cell more or less."""
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    k = rng.randrange(len(lines))
    cells = lines[k].split(",")
    j = rng.randrange(len(cells))
    kind = rng.randrange(9)
    if kind == 0:
        lines.insert(k, lines[k])
    elif kind == 1:
        del lines[k]
    elif kind == 2:
        lines[k : k + 2] = ["".join(lines[k : k + 2])]
    elif kind == 3:  # a column less, or more, in all lines
        change = rng.choice((lambda line: line.rpartition(",")[0], lambda line: line + ",more" if line else line))
        lines = [change(line) for line in lines]
    else:
        value = rng.choice(("", " ", '"', "\0", "9" * 30, "-1e999", "../../../etc/passwd", "é\r", "x" * 5000, "\u2028"))
        cells[j : j + 1] = [value] if kind < 7 else [cells[j], value]
        lines[k] = ",".join(cells)
    path.write_bytes("\n".join(lines).encode())


def swapped(path: Path, rng: random.Random) -> None:
    """Another value, type or number of them, at some place in a structured file."""
    try:
        _swap(path, rng)
    except (ValueError, EOFError, IndexError, pickle.UnpicklingError):  # a corruption in front of this one
        flipped(path, rng)


def _swap(path: Path, rng: random.Random) -> None:
    if path.suffix == ".pkl":
        content = pickle.loads(path.read_bytes())  # noqa: S301 - a test's own file
        path.write_bytes(pickle.dumps(mutated(content, rng)))
    elif path.suffix == ".yaml":
        content = mutated(yaml.load(path.read_text(encoding="utf-8"), PlainLoader), rng)  # noqa: S506 - a SafeLoader
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        k = rng.randrange(len(lines))
        lines[k] = json.dumps(mutated(json.loads(lines[k]), rng))
        path.write_text("\n".join(lines), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(path.read_text(encoding="utf-8")), rng)), encoding="utf-8")
    else:
        rows(path, rng)


def mutated(value, rng: random.Random):
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ABSURD)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    choice = rng.random()
    if choice < 0.15:
        del value[key]
    elif choice < 0.3:
        value = value | {f"{key}é": value[key]} if isinstance(value, dict) else [*value, value[key]]
    else:
        value[key] = mutated(value[key], rng)
    return value


# SciPy's reader crashes on some MATLAB files with changed bytes.
MATLAB = [gone, cut, empty, folder, loop, renamed, twin]
ANY = [*MATLAB, flipped, zeros]
TEXT = [rows, rows, encoded, swapped, swapped, swapped]


def damage(root: Path, rng: random.Random) -> list[tuple[str, Path, set[str]]]:
    """One or two corruptions below a folder: which, of which file, and what a message may call it."""
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        files = sorted(path for path in root.rglob("*") if path.is_file() and "again" not in str(path))
        tables = [path for path in files if path.suffix in TABLES]
        path = rng.choice(tables if tables and rng.random() < 0.6 else files)
        before = path.read_bytes()
        structured = path.suffix in TABLES and path.suffix != ".mat"
        is_matlab = before.startswith(b"MATLAB 5.0")
        corruption = rng.choice(ANY + TEXT * 2 if structured else MATLAB if is_matlab else ANY)
        if path.suffix == ".pkl" and corruption is rows:
            corruption = swapped
        path.unlink()  # the files that it is linked to stay as they are
        path.write_bytes(before)
        corruption(path, rng)
        done.append((corruption.__name__, path, names_of(path, before)))
    return done


def names_of(path: Path, before: bytes) -> set[str]:
    """What a message may call a file that was damaged: its name or folder, or the keys of a manifest's changed rows."""
    names = {path.stem, f"{path.parent}:", f"{path.parent} holds"}
    if path.suffix == ".jsonl" and path.is_file():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                key = json.loads(line)["path"] if line not in before else ""
                names |= {key} if isinstance(key, str) and key.strip() else set()
    return names


# -------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The configs with one prompt a class: 80 of 1000 classes take half a minute."""
    folder = shutil.copytree(CONFIGS, tmp_path_factory.mktemp("short") / "configs")
    (folder / "templates" / "openai.txt").write_text("a photo of a {c}.\n")
    return folder


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """Several thousand files are written; none has to outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def alarm():
    """Ends a run that hangs."""

    def stop(*_):
        raise Hangs(f"a run takes longer than {SECONDS} s")

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    yield
    set_alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)


def set_alarm(seconds: float) -> None:
    """Not by the clock alone: on a busy machine a run waits for its turn."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def run(kind: str, config: Path, root: Path, rng: random.Random, done: list | None) -> tuple[dict, list[str]]:
    """Prepare, where there is something to prepare, and evaluate: the result, and the rows without a file.

    Where there is a list `done`, what is prepared is damaged, and the list says how.
    """
    missing = []
    if (root / "download").exists():
        options = PrepareConfig(config, root / "download", root / "data", skip_missing=rng.random() < 0.5)
        missing = prepare(options)["missing"]
        if done is not None:
            done += damage(root / "data", rng)
    dataset = load_dataset_config(config, root / "data")
    options = {"workers": 0, "skip_bad": rng.random() < 0.7, "statistics": rng.random() < 0.2}
    return evaluate(InstantModel(), MODALITIES[kind], dataset, **options), missing


@pytest.mark.parametrize(("name", "lookalikes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_damage_is_named_or_counted(name, lookalikes, short, tmp_path, caplog):
    kind, write = lookalikes[name]
    place = "download" if lookalikes is LOOKALIKES else "data"
    (tmp_path / "whole").mkdir()
    counts = write(tmp_path / "whole" / place)
    config = with_counts(shutil.copytree(short, tmp_path / "configs") / f"{name}.yaml", counts)
    outcomes, faults = set(), []
    for number in range(RUNS):
        rng = random.Random(f"{name} {place} {number}")
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", root, symlinks=True, copy_function=os.link)
        where = rng.choice((place, place, place, "data", "config"))
        own = Path(shutil.copy(config, config.with_stem(f"{name}-{number}")))
        done = []
        if where == place:
            done = damage(root / place, rng)
        elif where == "config":
            swapped(own, rng)
            done = [("swapped", own, {own.stem})]
        before = contents(root)
        caplog.clear()
        set_alarm(SECONDS)
        try:
            result, missing = run(kind, own, root, rng, done if where == "data" else None)
            told = any(own.stem in text for text in warnings(caplog))
            if not told and not honest(result["protocol"], missing, counts):
                faults.append((number, where, done, result["protocol"]))
            outcomes.add("counted")
        except Exception as error:
            if not is_clear(error, done, own.stem):
                faults.append((number, where, done, "".join(traceback.format_exception(error)[-8:])))
            outcomes.add("refused")
        finally:
            set_alarm(0)
        if where != "data" and not before.items() <= contents(root).items():
            faults.append((number, where, done, "what was there before is lost"))
        shutil.rmtree(root)
    assert not faults, "\n\n".join(" | ".join(map(str, fault)) for fault in faults)
    assert outcomes == {"refused", "counted"}


def contents(root: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def is_clear(error: Exception, done: list[tuple[str, Path, set[str]]], dataset: str) -> bool:
    """Whether an error names what was damaged, or is a `UserError` with the counts that are wrong.

    The name of the dataset, which most errors start with, is not enough.
    """
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, UserError) and re.search(r"\d+ (samples|captions|classes|pictures), expected \d+", text):
        return True
    text = text if any(path.suffix == ".yaml" for _, path, _ in done) else text.replace(dataset, "")
    return any(name in text for _, _, names in done for name in names)


def honest(protocol: dict, missing: list[str], counts: dict[str, int]) -> bool:
    """Whether all that the dataset should hold is there, or counted as missing."""
    if protocol["limit"] or protocol["samples"] + protocol["skipped_samples"] + len(missing) != counts["samples"]:
        return protocol["limit"] is not None
    whole = not missing and not protocol["skipped_samples"]
    return not whole or protocol.get("captions") == counts.get("captions")


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
