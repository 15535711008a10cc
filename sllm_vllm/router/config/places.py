"""Checks a configuration against this machine: directories, slots, keys. Blocking, so call it in a thread."""

from __future__ import annotations

import difflib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sllm_vllm.config import visible_gpus
from sllm_vllm.errors import ConfigError
from sllm_vllm.node.core.launch import default_num_slots
from sllm_vllm.node.hardware import detect_hardware
from sllm_vllm.node.vllm_options import unknown_options
from sllm_vllm.router.config.file import Checked, check_router_config, read_key_digests
from sllm_vllm.router.config.problems import Diagnosis, InvalidConfig, Place, Problem, below, with_lines
from sllm_vllm.router.config.sections import KeysSection, ModelConfig, ModelDefaults, NodeSection, RouterConfig

MODEL_FILES = ("config.json", "params.json")
"""Files of which a model's directory holds at least one; the second is Mistral's."""
_NAMES_MAX = 1000
"""Most entries of a folder that are compared with a missing name, to suggest one."""


def check_on_this_machine(path: Path) -> Checked:
    """Check a file, and whether its directories, slots and keys exist on this machine."""
    found = check_router_config(path)
    here = with_lines(_problems_here(found.diagnosis, path.absolute().parent), found.lines)
    problems = with_lines([*found.problems, *here], found.lines)
    is_wrong = any(not problem.is_warning for problem in problems)
    return Checked(None if is_wrong else found.config, problems, found.diagnosis, found.lines)


def read_checked_config(path: Path) -> tuple[RouterConfig, list[Problem]]:
    """Return the configuration of a router on this machine, and warnings.

    Raises:
        InvalidConfig: something in it is wrong, or does not exist on this machine.
    """
    found = check_on_this_machine(path)
    if found.config is None:
        raise InvalidConfig([problem for problem in found.problems if not problem.is_warning], str(path))
    return found.config, found.problems


def require_model(node: NodeSection, model: ModelConfig) -> list[str]:
    """Check that a model can run here. Returns warnings.

    Raises:
        InvalidConfig: its directory does not exist or holds no model, or it takes more slots than the node has.
    """
    found = Diagnosis(sections={"node": node}, models={0: model})
    problems = below(list(_problems_here(found, Path("/"))), ("models", 0))
    if wrong := [problem for problem in problems if not problem.is_warning]:
        raise InvalidConfig(wrong)
    return [str(problem) for problem in problems]


def _problems_here(found: Diagnosis, directory: Path) -> Iterator[Problem]:
    node, keys = found.sections.get("node"), found.sections.get("keys")
    if isinstance(keys, KeysSection):
        yield from _key_problems(keys)
    if not isinstance(node, NodeSection):
        return
    if node.engine_command is None:  # another engine may name its models differently
        yield from _source_problems(found.models, directory)
        yield from _option_problems(found)
    yield from _slot_problems(node, found.models)


def _key_problems(keys: KeysSection) -> Iterator[Problem]:
    for section, sources in (("clients", keys.clients), ("admin", keys.admin), ("metrics", keys.metrics)):
        for index, source in enumerate(sources):
            try:
                read_key_digests([source], "")
            except ConfigError as error:
                yield Problem(("keys", section, index), str(error).removeprefix("[0]: "))


def _source_problems(models: Mapping[int, ModelConfig], directory: Path) -> Iterator[Problem]:
    for index, model in models.items():
        if problem := source_problem(model):
            yield Problem(("models", index, "source"), problem)
        elif not os.path.isabs(model.source) and (directory / model.source).is_dir():
            problem = f"taken as a name on the Hub; for the directory beside this file write ./{model.source}"
            yield Problem(("models", index, "source"), problem, is_warning=True)


def _option_problems(found: Diagnosis) -> Iterator[Problem]:
    defaults = found.sections.get("defaults")
    common = set(defaults.engine_arguments) if isinstance(defaults, ModelDefaults) else set()
    places: list[tuple[Place, Iterable[str]]] = [(("defaults",), sorted(common))]
    places += [
        (("models", num), [word for word in one.engine_arguments if word not in common])
        for num, one in found.models.items()
    ]
    for place, arguments in places:
        for option, near in unknown_options(arguments):
            hint = f"; did you mean {near}?" if near else ""
            yield Problem((*place, "engine_arguments"), f"vLLM has no option {option}{hint}", is_warning=True)


def source_problem(model: ModelConfig) -> str | None:
    """Return what is wrong with a source that is a path; None if it may be a model, or is a name on the Hub."""
    path = Path(model.source)
    if not path.is_absolute():
        return None
    try:
        if not stat.S_ISDIR(path.stat().st_mode):  # a GGUF file
            return None
        names = [entry.name for entry in os.scandir(path)]
    except FileNotFoundError:
        return f"there is no {path}{_nearest(path)}"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    if any(name in MODEL_FILES or name.endswith(".gguf") for name in names):
        return None
    return f"{path} holds no model: it has neither {' nor '.join(MODEL_FILES)}"


def _nearest(path: Path) -> str:
    """Return a hint for a missing path: the most similar name in its folder, or that the folder is missing, too."""
    try:
        names = [entry.name for entry in itertools.islice(os.scandir(path.parent), _NAMES_MAX)]
    except FileNotFoundError:
        return f", nor {path.parent}"
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _slot_problems(node: NodeSection, models: Mapping[int, ModelConfig]) -> Iterator[Problem]:
    try:
        hardware = detect_hardware(node.gpus, node.memory, visible_gpus())
    except ConfigError as error:
        yield Problem(("node", "gpus"), str(error))
        return
    num_slots = node.slots or default_num_slots(hardware)
    for index, model in models.items():
        if model.num_accelerators > num_slots:
            key = "engine_arguments" if model.accelerators is None else "accelerators"
            problem = f"each of its engines takes {model.num_accelerators} slots, but this node has {num_slots}"
            yield Problem(("models", index, key), problem)
    if hardware.gpus and num_slots > len(hardware.gpus):
        yield Problem(("node", "slots"), f"{num_slots} slots, but this machine has {len(hardware.gpus)} GPUs for them")
    num_kept = _num_kept(models.values())
    if num_kept > num_slots:
        problem = f"their min_replicas take {num_kept} slots in total, but this node has {num_slots}: not all will run"
        yield Problem(("models",), problem, is_warning=True)


def _num_kept(models: Iterable[ModelConfig]) -> int:
    return sum(model.min_replicas * model.num_accelerators for model in models)
