"""`launch.py --doctor`: what somebody who asks for help must say, and what is wrong, each with what to do about it.

It works where the program does not: nothing is imported here that may be missing or broken. What only torch and the
others can tell comes from another process (probe.py). Nothing is asked of the network, and the home folder is "~".
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from app.packages import fits, requirements, version
from app.probe import DEMO, DEVICES, Facts
from lora_core.errors import ConfigError
from lora_core.plain_text import plain

MODULES = {
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
}  # where they are not called as they are installed
OPTIONAL = ("xformers", "bitsandbytes", "tensorboard")
LITTLE = 5 * 2**30  # bytes free: an SDXL LoRA with its saves and caches
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT")

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. A problem keeps something from working; a warning does not."""

    name: str
    state: State
    said: str
    remedy: str = ""


def examine(models: Path, *, host: str, port: int) -> Iterator[Finding]:
    """Everything, as it is found. `models` as the app takes it; what it writes lies beside that."""
    for found in _findings(models.absolute(), host, port):
        yield Finding(found.name, found.state, homely(found.said), homely(found.remedy))


def told(findings: Sequence[Finding]) -> list[str]:
    """For people."""
    width = max(len(found.name) for found in findings)
    lines = []
    for found in findings:
        lines.append(f"{found.state:8} {found.name:{width}}  {found.said}")
        if found.remedy:
            lines.append(f"{'':8} {'':{width}}  -> {found.remedy}")
    counts = [(sum(f.state == state for f in findings), state) for state in ("problem", "warning")]
    said = ", ".join(f"{n} {state}{'s' if n > 1 else ''}" for n, state in counts if n)
    verdict = "LoRA Loom can be used" if usable(findings) else "LoRA Loom cannot be used as it is"
    return [*lines, "", f"{verdict}: {said or 'nothing is wrong'}."]


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps({"usable": usable(findings), "findings": [asdict(f) for f in findings]}, indent=1)


def usable(findings: Sequence[Finding]) -> bool:
    return all(found.state != "problem" for found in findings)


def homely(text: str) -> str:
    """One line of it, without the name of whoever sits there."""
    homes = {str(Path.home()), str(Path.home().resolve())} - {"/", "."}
    for home in sorted(homes, key=len, reverse=True):
        text = re.sub(
            re.escape(home) + r"(?![\w.-])", "~", text, flags=re.IGNORECASE if os.name == "nt" else 0
        )
    return plain(text, 600)


def _findings(models: Path, host: str, port: int) -> Iterator[Finding]:
    yield _system()
    wanted = requirements()
    facts = Facts.gathered([MODULES.get(name, name) for name in wanted if version(name)])
    for name, clauses in wanted.items():
        yield _package(name, clauses, facts)
    yield from (_optional(name) for name in OPTIONAL)
    yield from _devices(facts)
    yield _demo(facts)
    home = models.parent
    folders = [models / "Lora", models / "Stable-diffusion"]  # which may lie on other disks
    folders += [home / name for name in ("outputs", "runs", "datasets")]
    yield from (_folder(folder.name, folder) for folder in folders)
    yield _folder("hub cache", _hub_cache())
    yield _folder("temporary", Path(tempfile.gettempdir()))
    yield _port(host, port)
    yield _network()


def _system() -> Finding:
    memory = ""
    with contextlib.suppress(Exception):  # whatever a broken one raises
        import psutil  # noqa: PLC0415 - may be missing

        found = psutil.virtual_memory()
        memory = f", {_gb(found.total)} of memory ({_gb(found.available)} free)"
    own = version("lora-loom") or "not installed, run from its folder"
    return Finding(
        "system",
        "ok",
        f"LoRA Loom {own}, Python {platform.python_version()}, {platform.platform(terse=True)} "
        f"{platform.machine()}, {os.cpu_count()} cores{memory}",
    )


# --- packages ------------------------------------------------------------------------------------------------


def _package(name: str, clauses: str, facts: Facts) -> Finding:
    found = version(name)
    install = f'python -m pip install "{name}{clauses}"'
    if name == "torch":
        install += " (for an NVIDIA card with the --index-url that pytorch.org's Get Started page shows)"
    if not found:
        return Finding(name, "problem", f"is not installed; {clauses} is needed", install)
    module = MODULES.get(name, name)
    if module in facts.failed:
        again = install.replace("pip install", "pip install --force-reinstall", 1)
        return Finding(name, "problem", f"{found} cannot be imported: {facts.failed[module]}", again)
    if not fits(found, clauses):
        return Finding(name, "warning", f"{found}, and {clauses} is what LoRA Loom was tested with", install)
    if module not in facts.done:
        return Finding(name, "warning", f"{found}, not tried: another package ended the trial before it")
    return Finding(name, "ok", found)


def _optional(name: str) -> Finding:
    return Finding(name, "ok", version(name) or "not installed (it may be left out)")


# --- what only the packages can tell -------------------------------------------------------------------------


def _devices(facts: Facts) -> Iterator[Finding]:
    if DEVICES not in facts.done:
        yield _not_tried("devices", DEVICES, facts)
        return
    found = facts.done[DEVICES]
    for device in found["devices"]:
        memory = f", {_gb(device['total'])} ({_gb(device['free'])} free)" if "total" in device else ""
        missing = [name for name in ("fp16", "bf16") if name not in device["dtypes"]]
        yield Finding(
            "device",
            "warning" if missing and memory else "ok",
            f"{device['name']}{memory}: {', '.join(['fp32', *device['dtypes']])}",
            f"Choose another dtype than {' and '.join(missing)} in presets." if missing and memory else "",
        )
    if len(found["devices"]) > 1:
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()) and not hidden:
        built = found["built_for"]
        why = (
            f"torch is built for CUDA {built} and does not find it"
            if built
            else "this torch is built without CUDA"
        )
        remedy = (
            "Update the card's driver."
            if built
            else "python -m pip install --force-reinstall torch --index-url with the address that pytorch.org's Get "
            "Started page shows."
        )
        yield Finding("graphics card", "warning", f"there is an NVIDIA driver, but {why}", remedy)
    else:
        yield Finding(
            "graphics card",
            "ok",
            f"none{' to be seen: CUDA_VISIBLE_DEVICES hides it' if hidden else ''}. The included model trains in "
            "minutes all the same, a real one in many hours",
        )


def _demo(facts: Facts) -> Finding:
    if DEMO in facts.done:
        return Finding("included model", "ok", f"whole ({facts.done[DEMO]})")
    if DEMO in facts.failed:
        return Finding(
            "included model",
            "problem",
            facts.failed[DEMO],
            "Get presets/demo/base again, from where this is from.",
        )
    return _not_tried("included model", DEMO, facts)


def _not_tried(name: str, what: str, facts: Facts) -> Finding:
    if what in facts.failed:
        return Finding(name, "problem", facts.failed[what], "Say this where you ask for help.")
    return Finding(name, "warning", "not tried, as packages are missing or broken", "See to these first.")


# --- the machine ---------------------------------------------------------------------------------------------


def _folder(name: str, folder: Path) -> Finding:
    """Nothing is made where nothing is: the nearest folder there is tells whether it could be."""
    said = str(folder)
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        said += "" if place == folder else " (will be made)"
        if not place.is_dir():
            raise NotADirectoryError(20, "it is a file")
        with tempfile.NamedTemporaryFile(dir=place, prefix=".lora-loom-"):
            free = shutil.disk_usage(place).free
    except OSError as problem:
        why = problem.strerror or str(problem)
        return Finding(
            name, "problem", f"{said} cannot be written to: {why}", "Make it writable, or start in another."
        )
    if free < LITTLE:
        return Finding(
            name, "warning", f"{said}, only {_gb(free)} free", "Free some space before a long training."
        )
    return Finding(name, "ok", f"{said}, {_gb(free)} free")


def _hub_cache() -> Path:
    """Where huggingface_hub puts what it fetches, by its own rules: it may be broken itself."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser().absolute()


def _port(host: str, port: int) -> Finding:
    try:
        from app.listening import listen  # noqa: PLC0415 - its gate needs packages

        with listen(host, port) as ours:
            found = int(ours.getsockname()[1])
    except ConfigError as problem:
        return Finding("port", "problem", str(problem))
    except Exception as problem:  # whatever a broken package raises
        return Finding("port", "warning", f"not tried: {problem}", "See to the packages first.")
    if port not in (0, found):
        return Finding(
            "port", "warning", f"{port} is taken by another program; {found} would be used instead"
        )
    return Finding("port", "ok", f"{found} at {host} is free")


def _network() -> Finding:
    """Of addresses only that they are set: there may be passwords in them."""
    names = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    names += [name for name in _OFFLINE if os.environ.get(name)]
    also = f" Set here: {', '.join(names)}." if names else ""
    return Finding(
        "network",
        "ok",
        "none is needed, and none was tried. Opening, training, making pictures and all commands work offline; only a "
        f"Hugging Face id is fetched once, when it is opened first.{also}",
    )


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f} GB"
