"""Settings from a file, YAML or JSON, checked as flags are."""

import argparse
import difflib
import json
import os
from pathlib import Path
from typing import Any

from .by_name import parse_arguments
from .disk import plain_path
from .errors import UserError

MAPPINGS = ("loss_args", "beside_args", "miner_args")
COMMAND_LINE_ONLY = (
    *("config", "name", "output_dir", "resume", "resume_if_exists"),
    *("accept_changed_files", "report"),
)


def read_config(
    path: str, flags: argparse.ArgumentParser, defaults: dict[str, Any], recorded: tuple[str, ...]
) -> dict[str, Any]:
    """The settings in a file, as the flags of the same names would give them.

    A relative `data_root` starts from the file's folder. What is null has its default.

    Args:
        path: A YAML file or, with the suffix `.json`, a JSON file, such as `config.json` of a run.
        flags: Takes each setting as `--name value`.
        defaults: The settings with their defaults.
        recorded: What a run's `config.json` holds beside settings; left out.

    Raises:
        UserError: If the file cannot be read, or a setting is unknown or has a wrong value.
    """
    where = f"--config {path}"
    settings: dict[str, Any] = {}
    for key, value in _mapping(where, Path(path)).items():
        key = str(key).replace("-", "_")
        if key in recorded:
            continue
        _check_known(where, key, defaults)
        if value is not None:
            settings[key] = _value(f"{where}: {key}", key, value, flags, defaults)
    if "data_root" in settings:
        root = os.path.expanduser(settings["data_root"])
        settings["data_root"] = plain_path(os.path.join(os.path.dirname(path), root))
    return settings


def _mapping(where: str, path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(where, text)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected names and values, got {content!r:.80}")
    return content


def _yaml(where: str, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"{where}: YAML needs pip install pyyaml; JSON does not") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _check_known(where: str, key: str, defaults: dict[str, Any]) -> None:
    if key in defaults:
        return
    if key in COMMAND_LINE_ONLY:
        flag = "--" + key.replace("_", "-")
        raise UserError(f"{where}: {key} is no setting; give {flag} on the command line")
    near = difflib.get_close_matches(key, defaults, 3, 0.5)
    raise UserError(
        f"{where}: unknown setting {key!r}; expected "
        + (f"for instance {', '.join(near)}" if near else f"one of {', '.join(defaults)}")
    )


def _value(
    where: str, key: str, value: Any, flags: argparse.ArgumentParser, defaults: dict[str, Any]
) -> Any:
    default = defaults[key]
    if key in MAPPINGS:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected names and values, got {value!r}")
        # YAML takes 1e-2 for a string, and a flag for a number.
        return {
            k: parse_arguments(where, [f"{k}={v}"])[k] if isinstance(v, str) else v
            for k, v in value.items()
        }
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, got {value!r}")
        return value
    if isinstance(default, list) != isinstance(value, list):
        expected = "a list" if isinstance(default, list) else "one value"
        raise UserError(f"{where}: expected {expected}, got {value!r}")
    if isinstance(default, str) and not isinstance(value, str):
        raise UserError(f"{where}: expected text, got {value!r}")
    return _as_flag(where, key, value, flags)


def _as_flag(where: str, key: str, value: Any, flags: argparse.ArgumentParser) -> Any:
    """What the flag makes of the value, with its own checks."""

    def fail(message: str) -> None:
        raise UserError(f"{where}: {message.partition(': ')[2] or message}")

    flags.error = fail
    flag = "--" + key.replace("_", "-")
    if isinstance(value, list):
        return getattr(flags.parse_args([flag, *map(str, value)]), key) if value else []
    return getattr(flags.parse_args([f"{flag}={value}"]), key)
