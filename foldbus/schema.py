"""The schema file: what a service's messages look like, kept in the repository, and what a change of them breaks.

The file holds, per service, everything that others read or that is read again: its events, its commands and their
replies, and the events of others that it consumes; the states of deciders are its own affair. `compare` holds today's
code against it. Whether a change breaks something depends on who writes and who reads:

- **events** are stored and read again (today's class must take everything ever written), and public ones are read by
  other services, whose classes are as they were (what is written from now on must fit those);
- **commands** are sent by others, whose classes are as they were; their **replies** go back to those.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel
from pydantic.errors import PydanticInvalidForJsonSchema

from bus.errors import FoldbusError
from bus.messages import Command, Event, Message, TypeName
from foldbus.compatibility import Finding, findings, schema_of
from foldbus.service import Service

FILE = "foldbus-schema.json"
_FORMAT = 1

Level = Literal["breaking", "warning", "note"]
Document = Mapping[str, Any]


class BadSchema(FoldbusError):
    """There is no schema to be had: a model without one, or a file that is none."""


@dataclass(frozen=True, slots=True)
class Change:
    """`field` of message `type` (empty: the message itself; `reply…`: its answer) was `was` and is `now`. `why` says
    whom that breaks, `way_out` what to do instead."""

    level: Level
    type: str
    field: str
    was: str
    now: str
    why: str
    way_out: str = ""


# --- the document ----------------------------------------------------------------------------------------------------


def document(service: Service) -> dict[str, Any]:
    """One service's part of the file. Raises BadSchema for a model of which pydantic can make no JSON schema."""
    found: dict[str, Any] = {}
    for name, message in sorted(service.registry.types.items()):
        own = message.type_name.service == service.name
        if issubclass(message, Event):
            found[name] = {
                "kind": "event",
                "key": message.key_field,
                "public": message.public,
                "topic": service.topic_of(message) if message.public else None,
                "schema": _schema(message, name),
            }
        elif own:
            reply: type[BaseModel] | None = cast("type[Command[Any]]", message).reply_type()
            found[name] = {
                "kind": _kind(message),
                "key": message.key_field,
                "topic": f"{service.name}.commands",
                "reply": None if reply is None else {"type": _type_of(reply), "schema": _schema(reply, name)},
                "schema": _schema(message, name),
            }
    upcasters = {source: list(targets) for source, targets in service.registry.upcasting.table.items()}
    return {"messages": found, "upcasters": upcasters}


def _kind(message: type[Message]) -> str:
    return "command" if issubclass(message, Command) else "query"


def _type_of(reply: type[BaseModel]) -> str | None:
    return str(reply.type_name) if issubclass(reply, Message) else None


def _schema(model: type[BaseModel], name: str) -> dict[str, Any]:
    try:
        return schema_of(model)
    except PydanticInvalidForJsonSchema as error:
        raise BadSchema(f"{name}: {model.__qualname__} has no JSON schema: {error.message}") from error


def load(path: Path) -> dict[str, Document]:
    """Service name to its part. Raises BadSchema, also when there is no file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadSchema(f"there is no {path}; `foldbus schema write` makes it, to be committed") from None
    except (OSError, ValueError) as error:
        raise BadSchema(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("foldbus_schema") != _FORMAT:
        raise BadSchema(f"{path} is no schema file of format {_FORMAT}")
    return cast("dict[str, Document]", found.get("services", {}))


def save(path: Path, services: Mapping[str, Document]) -> None:
    """Whole or not at all; the same services are the same bytes."""
    made = {"foldbus_schema": _FORMAT, "services": services}
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(json.dumps(made, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


# --- what changed ----------------------------------------------------------------------------------------------------


def compare(before: Document, now: Document, *, service: str) -> list[Change]:
    """What became of `service`'s messages: worst first, then by type and field."""
    found: list[Change] = []
    old, new = before["messages"], now["messages"]
    for name in sorted({*old, *new}):
        if name not in old:
            found.append(Change("note", name, "", "absent", f"a new {new[name]['kind']}", "it is new"))
        elif name not in new:
            found.append(_removed(name, old[name], now, service))
        else:
            found += _changed(name, old[name], new[name], own=_own(name, new[name], service))
    for source, targets in sorted(before["upcasters"].items()):
        if source not in now["upcasters"] and source not in new:
            found.append(_upcaster_gone(source, targets))
    ranks: Sequence[Level] = ("breaking", "warning", "note")
    return sorted(found, key=lambda one: (ranks.index(one.level), one.type, one.field))


def _removed(name: str, was: Document, now: Document, service: str) -> Change:
    kind = was["kind"]
    if not _own(name, was, service):
        return Change("note", name, "", f"{kind} read here", "absent", "this service does not read it any more")
    if name in now["upcasters"]:
        targets = ", ".join(now["upcasters"][name]) or "nothing"
        if kind == "event" and was["public"]:
            why = f"what is stored is read as {targets}; consumers that name only {name} get no more of it"
            return Change("warning", name, "", kind, f"upcast to {targets}", why, _consumers_first(name))
        return Change("note", name, "", kind, f"upcast to {targets}", f"it is read as {targets}")
    if kind == "event":
        why = "stored events of this type cannot be read any more"
        why += "; consumers of it get no more" if was["public"] else ""
        out = "keep the class, or say what it is now: upcast(…), split_event(…) or drop_event(…) in Service(upcasters=)"
        return Change("breaking", name, "", kind, "absent", why, out)
    why = "callers that still send it get dead letters"
    out = "keep it until nobody sends it, or upcast it to the command that took its place"
    return Change("breaking", name, "", kind, "absent", why, out)


def _upcaster_gone(source: str, targets: Iterable[str]) -> Change:
    why = "messages of this type, stored or still sent, cannot be read any more"
    out = "put the upcaster back: what is stored stays as it was written, for good"
    return Change("breaking", source, "", f"upcast to {', '.join(targets) or 'nothing'}", "absent", why, out)


def _changed(name: str, was: Document, now: Document, *, own: bool) -> list[Change]:
    if was["kind"] != now["kind"]:
        out = f"leave {name} as it was and take another name for the {now['kind']}"
        return [Change("breaking", name, "", was["kind"], now["kind"], "all who know it know it as the other", out)]
    found: list[Change] = []
    if was["key"] != now["key"]:
        why = "the key names the stream and the partition: what is stored under the old one is another aggregate's"
        found.append(Change("breaking", name, "", f"key {was['key']}", f"key {now['key']}", why, _new_version(name)))
    if was["kind"] == "event":
        found += _event(name, was, now, own=own)
    else:
        found += _sent(name, was, now)
    return found


def _event(name: str, was: Document, now: Document, *, own: bool) -> list[Change]:
    found: list[Change] = []
    if was["public"] != now["public"]:
        if was["public"]:
            why, out = "consumers in other services get no more of it", "keep it public until nobody reads it"
            found.append(Change("breaking", name, "", "public", "private", why, out))
        else:
            found.append(Change("note", name, "", "private", "public", "from now on it is published"))
    elif was["topic"] != now["topic"]:
        why = "what is on the old topic and has not been handled is not read any more"
        out = "let the lag of the old topic reach 0 before this is deployed"
        found.append(Change("warning", name, "", f"on {was['topic']}", f"on {now['topic']}", why, out))
    stored = findings(was["schema"], now["schema"])
    found += [_of(name, "", one, *_STORED[one.what]) for one in stored]
    if own:
        seen = {one.path for one in stored}
        rules = _CONSUMED if was["public"] and now["public"] else _UNSEEN
        for one in findings(now["schema"], was["schema"], writes_all=True):
            level, why, out = rules[one.what]
            if level is None or (one.what == "missing" and one.path in seen):
                continue
            found.append(_of(name, "", one, level, why, out, turned=True))
    return _merged(found)


def _sent(name: str, was: Document, now: Document) -> list[Change]:
    found = [_of(name, "", one, *_CALLED[one.what]) for one in findings(was["schema"], now["schema"])]
    seen = {one.field for one in found}
    wider = findings(now["schema"], was["schema"])
    found += [
        _of(name, "", one, "note", "callers need not know", "", turned=True)
        for one in wider
        if one.path not in seen and one.what not in ("missing", "default")
    ]
    before, after = was["reply"], now["reply"]
    if before is None or after is None:
        if before is not after:
            why, out = "callers wait for an answer of the old form", _new_version(name)
            old, new = ("nothing" if one is None else str(one["type"] or "a reply") for one in (before, after))
            found.append(Change("breaking", name, "reply", old, new, why, out))
        return _merged(found)
    replied = findings(after["schema"], before["schema"], writes_all=True)
    answers = [_of(name, "reply", one, *_ANSWERED[one.what], turned=True) for one in replied]
    answers += [_of(name, "reply", one, *_REPEATED[one.what]) for one in findings(before["schema"], after["schema"])]
    return _merged([*found, *answers])


def _of(
    name: str, root: str, one: Finding, level: Level | None, why: str, way_out: str, *, turned: bool = False
) -> Change:
    """A finding in the order of time; `turned` when the writer is today's."""
    field = ".".join(part for part in (root, one.path) if part)
    was, now = (one.read, one.written) if turned else (one.written, one.read)
    assert level is not None
    return Change(level, name, field, was, now, why, way_out.format(new_version=_new_version(name)))


def _merged(found: Sequence[Change]) -> list[Change]:
    """What one change of one field breaks, said once, with all reasons. A field that breaks something is not told of
    as new or wider besides."""
    troubled = {one.field for one in found if one.level != "note"}
    found = [one for one in found if one.level != "note" or one.field not in troubled]
    by_field: dict[tuple[str, str, str], list[Change]] = {}
    for one in found:
        by_field.setdefault((one.field, one.was, one.now), []).append(one)
    merged: list[Change] = []
    ranks: Sequence[Level] = ("breaking", "warning", "note")
    for same in by_field.values():
        worst = min(same, key=lambda one: ranks.index(one.level))
        serious = [one for one in same if one.level == worst.level or one.level == "breaking"]
        why = "; ".join(dict.fromkeys(one.why for one in serious))
        out = "; ".join(dict.fromkeys(one.way_out for one in serious if one.way_out))
        merged.append(Change(worst.level, worst.type, worst.field, worst.was, worst.now, why, out))
    return merged


def _own(name: str, part: Document, service: str) -> bool:
    """Made here, not only read here."""
    return name.split(".")[0] == service and part["topic"] in (None, f"{service}.events", f"{service}.commands")


def _new_version(name: str) -> str:
    parsed = TypeName.parse(name)
    return (
        f"leave {name} as it is and make {parsed.base}.v{parsed.version + 1} of the new form, "
        f"with upcast({name!r}, to=…)"
    )


def _consumers_first(name: str) -> str:
    return f"deploy the consumers first, with classes or upcasters for both, then stop publishing {name}"


# --- the rules -------------------------------------------------------------------------------------------------------

Rule = tuple[Level | None, str, str]
Rules = Mapping[str, Rule]

_UNREADABLE = "stored events cannot be read any more: their {}"
_STORED: Mapping[str, tuple[Level, str, str]] = {
    "missing": ("breaking", _UNREADABLE.format("JSON lacks it"), "give it a default, or {new_version}"),
    "unread": (
        "breaking",
        "what stored events say in it is not read any more, and consumers do not get it (renamed is removed and new)",
        "keep it, with a default if nothing sets it any more, or {new_version}",
    ),
    "refused": ("breaking", _UNREADABLE.format("JSON has it"), "allow further fields, or {new_version}"),
    "type": ("breaking", _UNREADABLE.format("values are of the old type"), "take both types, or {new_version}"),
    "value": ("breaking", _UNREADABLE.format("values may be the removed one"), "keep the value, or {new_version}"),
    "bound": ("breaking", _UNREADABLE.format("values may be out of bounds"), "keep the bounds, or {new_version}"),
    "form": ("breaking", _UNREADABLE.format("values may have the old form"), "keep the form, or {new_version}"),
    "default": (
        "warning",
        "stored events without it are read with another value than before, by every fold",
        "keep the default, or {new_version}",
    ),
}
"""Today's class reads what older ones wrote."""

_FIRST = "deploy the consumers first, with a class that takes both, or {new_version}"
_CONSUMED: Rules = {
    "missing": ("breaking", "consumers in other services require it", "keep it, or {new_version}"),
    "unread": ("note", "consumers that do not know it ignore it", ""),
    "refused": ("breaking", "consumers in other services refuse fields that they do not know", _FIRST),
    "type": ("breaking", "consumers in other services take the old type only", _FIRST),
    "value": ("warning", "consumers with the old list of values put such events into their dead letters", _FIRST),
    "bound": ("warning", "consumers with the old bounds put such events into their dead letters", _FIRST),
    "form": ("breaking", "consumers in other services take the old form only", _FIRST),
    "default": (None, "", ""),
}
"""Older classes, in other services, read what today's writes."""

_UNSEEN: Rules = {
    "missing": (None, "", ""),
    "default": (None, "", ""),
    "unread": ("note", "it is new", ""),
    **dict.fromkeys(("refused", "type", "value", "bound", "form"), ("note", "it is wider, and private", "")),
}

_DEAD = "commands of callers with the old class become dead letters: {}"
_LATER = "until no caller has the old class; or {new_version}"
_CALLED: Mapping[str, tuple[Level, str, str]] = {
    "missing": ("breaking", _DEAD.format("they lack it"), f"give it a default {_LATER}"),
    "unread": ("note", "what callers still send in it is ignored", ""),
    "refused": ("breaking", _DEAD.format("they have it"), f"allow further fields {_LATER}"),
    "type": ("breaking", _DEAD.format("they send the old type"), f"take both types {_LATER}"),
    "value": ("breaking", _DEAD.format("they may send the removed value"), f"keep the value {_LATER}"),
    "bound": ("breaking", _DEAD.format("they may send what is out of bounds"), f"keep the bounds {_LATER}"),
    "form": ("breaking", _DEAD.format("they may send the old form"), f"keep the form {_LATER}"),
    "default": ("warning", "commands without it mean something else than before", f"keep the default {_LATER}"),
}
"""Today's class reads what older ones, in other services, send."""

_KEEP = "keep it until no caller has the old class; or {new_version}"
_ANSWERED: Mapping[str, tuple[Level, str, str]] = {
    "missing": ("breaking", "callers with the old class require it in the answer", _KEEP),
    "unread": ("note", "callers that do not know it ignore it", ""),
    "refused": ("breaking", "callers with the old class refuse what they do not know", _KEEP),
    "type": ("breaking", "callers with the old class cannot read the answer", _KEEP),
    "value": ("warning", "callers with the old list of values cannot read such an answer", _KEEP),
    "bound": ("warning", "callers with the old bounds cannot read such an answer", _KEEP),
    "form": ("breaking", "callers with the old class cannot read the answer", _KEEP),
    "default": ("note", "the answer always says it", ""),
}
"""Older classes, in other services, read the answers that today's give."""

_STALE = "an answer that was stored before is given again to whoever repeats the command; new callers cannot read it"
_REPEATED: Mapping[str, tuple[Level, str, str]] = {
    "unread": ("note", "callers with the old class do without it", ""),
    "default": ("note", "the answer always says it", ""),
    **dict.fromkeys(
        ("missing", "refused", "type", "value", "bound", "form"),
        ("warning", _STALE, "let the reply's class take both (a default, a union); or {new_version}"),
    ),
}
