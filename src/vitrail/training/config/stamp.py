"""The config of a run, with a checksum of its settings: a run is not resumed with settings that were changed since."""

import hashlib
import re
from pathlib import Path

from vitrail.errors import ConfigError
from vitrail.training.config.schema import TrainConfig, parse_toml, read_text, to_toml

_LINE = re.compile(r"^# sha256 of the settings: ([0-9a-f]{64})$", re.MULTILINE)


def to_run_toml(config: TrainConfig, keys: tuple[str, ...]) -> str:
    """`to_toml` with the checksum in the last line."""
    text = to_toml(config, keys)
    return f"{text}\n# sha256 of the settings: {_digest(parse_toml(text, 'the config'))}\n"


def read_run_toml(path: Path) -> TrainConfig:
    """The config of a run.

    Raises:
        ConfigError: as `read_config`, or a setting was changed.
    """
    text = read_text(path)
    config = parse_toml(text, path)
    found = _LINE.search(text)
    if found is None or found[1] != _digest(config):
        raise ConfigError(
            f"{path} was changed after the run was started, or is damaged: restore it; settings that may change are "
            "given with --resume, such as workers=4"
        )
    return config


def _digest(config: TrainConfig) -> str:
    """Of the values, not of their order or the comments."""
    return hashlib.sha256(to_toml(config).encode("utf-8", "surrogateescape")).hexdigest()
