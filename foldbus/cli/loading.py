"""What commands share: finding the service that `module:name` means, settings with options over them."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from bus.codec import explain
from bus.errors import FoldbusError
from foldbus.backends import BusUrl, StoreUrl, refuse_plaintext
from foldbus.service import Service
from foldbus.settings import Settings

AppArgument = Annotated[str, typer.Argument(metavar="MODULE:NAME", help="The service, as shop.orders:app")]
AppsArgument = Annotated[list[str], typer.Argument(metavar="MODULE:NAME...", help="One service, or several")]
StoreOption = Annotated[str | None, typer.Option("--store", help="sqlite:DIRECTORY or postgresql://… (FOLDBUS_STORE)")]
BusOption = Annotated[str | None, typer.Option("--bus", help="embedded:DIRECTORY or kafka://… (FOLDBUS_BUS)")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of a table")]
UnusedStore = Annotated[str | None, typer.Option("--store", hidden=True)]
UnusedBus = Annotated[str | None, typer.Option("--bus", hidden=True)]
"""Every command takes both options, so that all can be called alike."""
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")]

_FOR_TESTS = "FOLDBUS_TEST_"


class CannotLoad(FoldbusError):
    """`module:name` is no service."""


class BadSettings(FoldbusError):
    """A FOLDBUS_ variable has a value that it cannot have."""


def load_service(path: str) -> Service:
    """The service behind `package.module:name`; the working directory counts, as with `python -m`."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise CannotLoad(f"{path!r} names no service; wanted MODULE:NAME, for example shop.orders:app")
    if "/" in module_name or module_name.startswith("."):
        raise CannotLoad(_names_a_file(path, module_name, name))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CannotLoad(_why_not(path, module_name, name, error)) from error
    found = getattr(module, name, None)
    if found is None:
        services = [one for one, value in vars(module).items() if isinstance(value, Service)]
        raise CannotLoad(f"module {module_name} has no {name!r}; its services: {', '.join(services) or 'none'}")
    if not isinstance(found, Service):
        raise CannotLoad(f"{path!r} is {type(found).__name__}, wanted a foldbus.Service")
    return found


def _names_a_file(path: str, module_name: str, name: str) -> str:
    meant = module_name.removesuffix(".py").replace("/", ".").strip(".")
    return f"{path!r} names a file; wanted a module, most likely {meant}:{name}"


def _why_not(path: str, module_name: str, name: str, error: ImportError) -> str:
    """A module that is not there, or one that is there and imports something that is not."""
    if module_name.endswith(".py"):
        return _names_a_file(path, module_name, name)
    parents = module_name.split(".")
    absent = isinstance(error, ModuleNotFoundError) and error.name is not None
    if absent and error.name in {".".join(parents[:n]) for n in range(1, len(parents) + 1)}:
        return f"{path!r}: {error}; looked in the working directory and in this environment"
    return f"{path!r}: an import inside that module fails: {error}"


def settings(store: str | None = None, bus: str | None = None) -> Settings:
    """The environment's settings, with what the command line says over them. Raises BadSettings, BadUrl and, where
    strict, PlaintextLink; a variable of ours that nothing reads is named on standard error: it is most likely
    misspelt."""
    known = {f"FOLDBUS_{name.upper()}" for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith("FOLDBUS_") and name.upper() not in known and not name.startswith(_FOR_TESTS):
            print(
                f"foldbus: {name} is set, but nothing reads it; known are {', '.join(sorted(known))}", file=sys.stderr
            )
    try:
        read = Settings()
    except ValidationError as error:
        raise BadSettings(f"FOLDBUS_ settings: {explain(error)}") from error
    chosen = read.model_copy(update={name: value for name, value in (("store", store), ("bus", bus)) if value})
    at, through = StoreUrl.parse(chosen.store), BusUrl.parse(chosen.bus)  # both, before anything is opened
    if chosen.strict:
        refuse_plaintext(at, through, chosen.kafka())
    return chosen
