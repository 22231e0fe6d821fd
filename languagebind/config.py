"""Options are fields of frozen dataclasses. Each field is a flag, and a YAML file is a saved command line.

`lr: 5e-4` in a file means `--lr=5e-4` before the user's own flags, and the last flag wins. Values are parsed as flags,
so `5e-4` becomes a number although YAML reads a string. The error for an unknown key suggests the nearest name.
"""

import argparse
import dataclasses
import difflib
import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .files import twice

T = TypeVar("T")


class UserError(ValueError):
    """An error the user can fix, shown as one line without a traceback."""


def parse(cls: type[T], argv: Sequence[str] | None, prog: str | None = None, description: str | None = None) -> T:
    """Return a `cls` filled from flags. A wrong flag ends the program with status 2 and suggests the nearest name."""
    import tyro

    known = list(_option_names(cls))
    if clash := twice(known):
        raise UserError(f"two options of {cls.__name__} are both named {clash}; rename one of them")
    # OmitArgPrefixes: `--lr`, not `--optim.lr`. Nested dataclasses only group the help.
    options = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        name = flag_name(word)
        if name and not {name, name.removeprefix("no_")} & {*known, "help"} and not name.startswith("tyro_"):
            where = f"{word.file}: " if isinstance(word, FileWord) else ""
            print(f"error: {where}no option {name!r}; the nearest are {_nearest(name, known)}", file=sys.stderr)
            sys.exit(2)
    return tyro.cli(cls, args=argv, prog=prog, description=description, config=options)


def at_least(least: float, **options: float | None) -> None:
    """Raise `UserError` unless each option is None or a finite number of at least `least`."""
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name} should be a number of at least {least}, got {value}")


class FileWord(str):
    """A word of a command line that comes from a config file."""

    file: Path


def flag_name(word: str) -> str:
    """Return the name of the option that a flag sets, such as `batch_size`, or "" for other words."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else ""


def _nearest(name: str, known: list[str]) -> str:
    """Return the flags of the known options that are most like a name or are its initials (learning_rate, lr)."""
    initials = "".join(part[:1] for part in name.split("_"))
    near = [initials] * (initials in known) + difflib.get_close_matches(name, known, n=3, cutoff=0)
    return ", ".join("--" + each.replace("_", "-") for each in dict.fromkeys(near[:3]))


def expand_config(argv: Sequence[str] | None, find: Callable[[str], Path] = Path) -> list[str]:
    """Return the flags in the file that `find` finds for each `--config NAME`, followed by all other flags."""
    files, rest = flags_of_files(sys.argv[1:] if argv is None else argv, find)
    return [flag for words in files for flag in words] + rest


def flags_of_files(
    argv: Sequence[str], find: Callable[[str], Path] = Path, several: bool = False
) -> tuple[list[list[str]], list[str]]:
    """Return the flags in each --config file and, before them, in the files that it lists; and all other flags."""
    names, rest = take_flag(argv, "--config", several)
    files: list[list[str]] = []
    for name in names:
        path = find(name)
        listed, own = flags_of_files(yaml_to_argv(path), partial(_beside, path, find), several=True)
        files += [*listed, own]
    return files, rest


def _beside(path: Path, find: Callable[[str], Path], name: str) -> Path:
    return path.parent / name if (path.parent / name).is_file() else find(name)


def take_flag(argv: Sequence[str], flag: str, several: bool = False) -> tuple[list[str], list[str]]:
    """Return all values of a flag, and the other arguments.

    Accepts `--flag a`, `--flag=a` and, if `several`, `--flag a b`. Some flags, such as `--config` and `--modality`,
    decide which other flags exist, so they are read before the rest is parsed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest="values", action="extend", nargs="+" if several else 1, default=[])
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{flag} needs a value") from error
    return found.values, rest


def gather_flags(argv: Sequence[str], *flags: str) -> list[str]:
    """Merge repeated uses of each flag into one, because the parser would keep only the last."""
    rest = list(argv)
    for flag in flags:
        values, rest = take_flag(rest, flag, several=True)
        rest += [flag, *values] if values else []
    return rest


def yaml_to_argv(path: Path) -> list[str]:
    """Return the flags in a YAML file. Nested sections only group keys, except that of `mixture`."""
    values = list(_leaves(load_yaml(path)))
    if key := twice(key for key, _ in values):
        raise UserError(f"{path} gives {key} twice")
    words: list[Any] = [FileWord(word) for key, value in values for word in as_flag(key, value)]
    for word in words:
        word.file = path
    return words


def as_flag(key: str, value: Any) -> list[str]:
    """Return the words of a command line that give an option a value."""
    flag = "--" + key.replace("_", "-")
    if isinstance(value, dict):
        value = [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)] if value else []
    return [f"{flag}={value}"]


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; numbers and dates stay strings. Raises `UserError` if there is none."""
    import yaml  # only when needed: models and losses need only PyTorch

    from ._yaml import PlainLoader

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=PlainLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError) as error:  # KeyError: `!!bool` before another word
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should contain `key: value` lines")
    return content


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain values that YAML, JSON and a weights-only checkpoint can store."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # tuples become lists, paths become strings


def digest(value: Any) -> str:
    """Return the SHA-256 of a plain value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def refuse_changes(what: object, before: Mapping[str, Any], now: Mapping[str, Any], advice: str) -> None:
    """Raise `UserError` if something was made with other facts than now. Facts that `before` lacks are not compared."""
    if changed := [key for key in now if before.get(key, now[key]) != now[key]]:
        raise UserError(f"{what} was made with {changed[0]} {before[changed[0]]}, not {now[changed[0]]}: {advice}")


def package(name: str, user: str, install: str) -> Any:
    """Import an optional package or a module of it. Raises `UserError` if what `user` needs is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{user} needs {name.partition('.')[0]}: pip install {install} ({error})") from error


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild a dataclass from the values of `to_dict`. Raises `UserError` if a key is not an option of the class."""
    hints, known = get_type_hints(cls), {}
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass
    if unknown := values.keys() - names:
        raise UserError(f"unknown {cls.__name__} options: {', '.join(sorted(unknown))}")
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)
        known[name] = tuple(value) if isinstance(value, list) else value
    return cls(**known)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run(main: Callable[[], int | None]) -> None:
    """Exit with the status that `main` returns. A `UserError` becomes one line on standard error, and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _option_names(cls: Any) -> Iterator[str]:
    origin = get_origin(cls) or cls
    arguments = dict(zip(getattr(origin, "__parameters__", ()), get_args(cls), strict=False))
    hints = get_type_hints(origin)
    for option in dataclasses.fields(origin):
        kind = arguments.get(hints[option.name], hints[option.name])
        if dataclasses.is_dataclass(get_origin(kind) or kind):
            yield from _option_names(kind)
        else:
            yield option.name


def _leaves(mapping: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and key != "mixture":
            yield from _leaves(value)
        else:
            yield str(key), value
