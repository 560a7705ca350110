"""Code from outside raypipe that a configuration names: imported, checked and identified once.

The driver does this before any work. So what cannot be imported, and options that a part refuses,
end a run before it starts; and a stage whose code has changed runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raypipe.config import Config
from raypipe.config.outside import NamedCode, named_code
from raypipe.config.parts import validated_options
from raypipe.distributed.code_identity import CodeIdentity, code_identity
from raypipe.distributed.installed_parts import find_part
from raypipe.plugins import SCORE, STRATEGY, load, package_of
from raypipe.runs.ledger import StageRecord
from raypipe.runs.outside_code import code_text, recorded_code


@dataclass(frozen=True)
class OutsideCode:
    """Imported code.

    Attributes
    ----------
    named : NamedCode
        Where the configuration names it.
    identity : CodeIdentity
        Changes when its results can.
    options : dict
        Options of a part.
    texts : dict
        How the report describes it, and the package that declares it.
    """

    named: NamedCode
    identity: CodeIdentity
    options: dict[str, Any]
    texts: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what the ledger records."""
        return {
            "setting": self.named.setting,
            "name": self.named.name,
            "hash": self.identity.hash,
            "options": self.options,
            **self.texts,
        }

    def text(self) -> str:
        """Return a line about it."""
        return code_text(self.record())


def import_code(config: Config) -> tuple[OutsideCode, ...]:
    """Import all code that a configuration names.

    Raises
    ------
    ConfigError
        If some of it cannot be imported, or options of a part are wrong.
    """
    return tuple(_imported(config, named) for named in named_code(config))


def _imported(config: Config, named: NamedCode) -> OutsideCode:
    if named.kind is None:
        return OutsideCode(named, code_identity(load(named.name, named.setting)), {}, {})
    part = find_part(named.kind, named.name, named.setting)
    if named.kind == STRATEGY:
        from raypipe.selection.outside import strategy_of_class

        strategy_of_class(named.name, part)
    section = getattr(config, named.kind.setting.partition(".")[0])
    options = validated_options(part, named.kind, named.name, section.options)
    texts = {
        "summary": part.summary,
        "package": package_of(named.kind, named.name),
        **({"high_is_hard": part.high_is_hard} if named.kind == SCORE else {}),
        **({"kept": part.kept} if named.kind == STRATEGY else {}),
    }
    return OutsideCode(named, code_identity(part), options.model_dump(mode="json"), texts)


def of_stage(stage: str, code: Sequence[OutsideCode]) -> list[dict[str, Any]]:
    """Return the records of the code that a stage is the first to depend on."""
    return [item.record() for item in code if item.named.stage == stage]


def changes(record: StageRecord | None, stage: str, code: Sequence[OutsideCode]) -> list[str]:
    """Return which code of a stage has changed since its record, one phrase each."""
    before = {(item["setting"], item["name"]): item["hash"] for item in recorded_code(record)}
    return [
        f"the code of {item['setting']} {item['name']} has changed"
        for item in of_stage(stage, code)
        if before.get((item["setting"], item["name"]), item["hash"]) != item["hash"]
    ]


def report_unseen(code: Sequence[OutsideCode], say: Callable[[str], None]) -> None:
    """Report what the identity of code does not cover."""
    for item in code:
        if item.identity.unseen:
            say(
                f"note: {item.named.setting}: a change of {', '.join(item.identity.unseen[:3])}, "
                f"which {item.named.name} uses, goes unnoticed; use --redo {item.named.stage} "
                "after one"
            )


def fingerprint_of(stage: str, code: Sequence[OutsideCode]) -> list[Mapping[str, Any]]:
    """Return what the fingerprint of a stage covers of its code."""
    return [
        {name: item[name] for name in ("setting", "name", "hash", "options")}
        for item in of_stage(stage, code)
    ]
