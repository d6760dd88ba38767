"""What to write instead of a command or option that there is not, such as those of other libraries."""

import re
from typing import Any

# Commands of timm, ultralytics, fastai and others.
COMMANDS = {
    **dict.fromkeys(("val", "validate", "eval", "test", "score"), "evaluate"),
    **dict.fromkeys(("fit", "finetune", "fine-tune", "fine_tune", "resume"), "train"),
    **dict.fromkeys(("infer", "inference", "classify", "detect", "label"), "predict"),
    **dict.fromkeys(("benchmark", "tune"), "compare"),
    **dict.fromkeys(("list", "list-models", "list_models", "ls"), "models"),
    **dict.fromkeys(("features", "extract"), "embed"),
    **dict.fromkeys(("convert", "onnx"), "export"),
    **dict.fromkeys(("check", "checks", "clean"), "doctor"),
}
OPTIONS = {
    "--format": "--target",
    "--runtime": "--target",
    "--imgsz": "--img-size",
    "--image-size": "--img-size",
    "--topk": "--top",
    "--output": "--out",
    "--output-dir": "--out",
    "--batch": "--batch-size",
    "--bs": "--batch-size",
}
_ARGUMENTS = {"source": "paths", "input": "paths", "path": "paths", "dataset": "data", "checkpoint": "model"}


def other_command(message: str) -> str:
    """The message of an unknown command, with the command of vitrail for it if another library has it."""
    found = re.fullmatch(r"No such command '(.+)'", message)
    known = COMMANDS.get(found[1].lower()) if found else None
    return f"{message}: it is `vitrail {known}`" if known else message


def other_option(name: str, command: Any) -> str:
    """What to write instead of an option that a command does not have, or "". command: of click."""
    options = {option for each in command.params if each.param_type_name == "option" for option in each.opts}
    if OPTIONS.get(name) in options:
        return f"{name} is {OPTIONS[name]}"
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    word = name.lstrip("-").replace("-", "_").lower()
    for each in arguments:
        if each.name in (word, _ARGUMENTS.get(word)):
            usual = " ".join(argument.metavar for argument in arguments if argument.name != "settings")
            return f"{each.metavar} is written without {name}: `vitrail {command.name} {usual}`"
    return ""
