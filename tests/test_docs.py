"""The documentation: the reference is complete, links lead somewhere, and examples run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from helpers import digit_pngs
from pydantic import BaseModel

import raypipe
from raypipe import cli, errors
from raypipe.config import Config
from raypipe.evaluation.certificate import VERDICT_EXIT_CODES
from raypipe.nightly.night import REFRESH_EXIT_CODE

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RUN_PAGES = [ROOT / "README.md", DOCS / "quickstart.md"]
"""Pages whose examples are run."""
NOT_RUN = re.compile(r"<!-- not run: ([^>]+) -->")
MOST_NOT_RUN = 3
"""Blocks of a page that can be marked as not run."""

QUICK = {
    "source.fragment_samples": 512,
    "seed.fraction": 0.3,
    "proxy.model": "small",
    "proxy.image_size": 8,
    "proxy.epochs": 3,
    "proxy.checkpoints": 2,
    "measure.max_actors": 1,
    "embed.max_actors": 1,
    "extrapolate.epochs": 2,
    "extrapolate.folds": 1,
    "extrapolate.judge_published": False,
    "trust.min_spearman": -1,
    "trust.min_stability": -1,
    "trust.min_accuracy_over_chance": -1,
    "report.images": 4,
}
"""Settings that make the runs of the examples quick, and nothing else different."""


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The hook that generates the reference pages."""
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the reference --------------------------------------------------------------------------------


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {word}")


def _section(page: str, heading: str) -> str:
    """The part of a page under a heading, up to the next heading of any level."""
    lines = page.split("\n")
    start = next(
        n for n, line in enumerate(lines) if re.match(rf"#+ {re.escape(heading)} \{{", line)
    )
    stop = next((n for n in range(start + 1, len(lines)) if lines[n].startswith("#")), len(lines))
    return "\n".join(lines[start:stop])


def test_every_command_and_option_is_in_the_reference(reference: ModuleType) -> None:
    page = reference.cli_page()
    found = list(_commands(cli.cli, "raypipe"))
    assert len(found) > 10
    for name, command in found:
        part = _section(page, name)
        for param in command.params:
            if isinstance(param, click.Argument):
                assert (param.metavar or param.name or "").upper() in part, (name, param.name)
                continue
            assert isinstance(param, click.Option)
            rows = [
                row
                for row in part.split("\n")
                if f"`{param.opts[0]}" in row or f", {param.opts[0]}" in row
            ]
            assert rows, (name, param.opts)
            for spelling in (*param.opts, *param.secondary_opts):
                assert spelling in rows[0], (name, spelling)
            plain = rows[0].replace("\\", "")
            assert " ".join((param.help or "").split()).replace("\\", "") in plain, (
                name,
                param.opts,
            )
            default = param.to_info_dict()["default"]
            if default is not None and not param.is_flag and not param.multiple:
                assert f"`{default}`" in rows[0], (name, param.opts)


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _settings(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def test_every_setting_is_in_the_reference(reference: ModuleType) -> None:
    rows = reference.settings_page().split("\n")
    found = list(_settings(Config))
    assert len(found) > 100
    for name, info in found:
        row = [row for row in rows if row.startswith("|") and f"`{name}` |" in row]
        assert len(row) == 1, name
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row[0])][2:-1]
        kind, default, _, text = cells
        assert kind and kind != "any", name
        assert info.description, name
        assert text.replace("\\", "").replace("&lt;", "<") == info.description.replace("\\", ""), (
            name
        )
        if info.is_required():
            assert default == "*required*", name
        else:
            stated = yaml.safe_load(default.strip("`"))
            expected = list(info.default) if isinstance(info.default, tuple) else info.default
            assert stated == expected or stated == pytest.approx(expected, rel=1e-5), name


def test_names_that_are_allowed_are_in_the_reference(reference: ModuleType) -> None:
    page = reference.settings_page()
    row = next(row for row in page.split("\n") if "`select.strategy` |" in row)
    for strategy in ("top", "ccs", "beta", "random"):
        assert f"`{strategy}`" in row
    assert "> 0, ≤ 1" in next(row for row in page.split("\n") if "`seed.fraction` |" in row)


def test_every_public_name_is_in_the_reference(reference: ModuleType) -> None:
    page = reference.python_page()
    for name in raypipe.__all__:
        assert f"raypipe.{name}" in page
        if not name.startswith("_"):
            assert f'<a id="raypipe.{name}"></a>' in page
    for path in re.findall(r"^::: (\S+)$", page, re.M):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_every_error_is_in_the_reference_with_its_exit_code(reference: ModuleType) -> None:
    page = reference.exit_codes_page()
    whole = reference.expanded((DOCS / "reference" / "exit-codes.md").read_text(), "")
    every = [errors.RaypipeError]
    for error in every:
        every += [inner for inner in error.__subclasses__() if inner.__module__ == errors.__name__]
        row = next(row for row in page.split("\n") if f'id="{error.__name__}"' in row)
        assert f"| {error.exit_code} |" in row
    assert len(every) > 5
    codes = {error.exit_code for error in every} | {REFRESH_EXIT_CODE}
    assert codes | set(VERDICT_EXIT_CODES.values()) == set(errors.EXIT_CODES)
    for code, text in errors.EXIT_CODES.items():
        assert f"\n| {code} | {text[0].upper()}{text[1:]} |" in whole
    # readers of the repository see the same table as those of the site
    assert reference.exit_code_table() in (DOCS / "reference" / "exit-codes.md").read_text()


def test_the_top_of_the_help_lists_every_exit_code() -> None:
    shown = CliRunner().invoke(cli.cli, ["--help"]).output.partition("Exit codes:")[2]
    assert [int(line.split()[0]) for line in shown.splitlines() if line] == [*errors.EXIT_CODES]


@pytest.mark.ray
def test_tables_of_files_have_the_columns_of_a_run(finished: str) -> None:
    import pyarrow.parquet as pq

    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    patterns = {
        "scores": "scores/*.parquet",
        "keep": "keep/*.parquet",
        "rejects": "rejects/*.parquet",
        "report": "report/map.parquet",
        "fragments": "index/fragments-*.parquet",
        "seed": "seed/*.parquet",
        "trajectory": "proxy/trajectory/*.parquet",
        "embeddings": "embeddings/*.parquet",
    }
    for anchor, pattern in patterns.items():
        part = page[page.index(f"{{#{anchor}}}") :].split("\n#", 1)[0]
        stated = {
            name
            for row in part.split("\n")
            if row.startswith("| `") and "`raypipe." not in row
            for name in re.findall(r"`([\w]+)`", row.split("|")[1])
        }
        files = sorted(Path(finished).glob(pattern))
        assert files or anchor == "rejects", pattern
        optional = {"weight"} if anchor == "keep" else set()
        for file in files[:1]:
            assert stated - optional == set(pq.read_schema(file).names), pattern


# -- links ----------------------------------------------------------------------------------------


@dataclass
class Page:
    """A page with its code blocks blanked out, and what links to it can name."""

    text: str
    anchors: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, markdown: str, reference: ModuleType) -> Page:
        lines = reference.lines_and_code(markdown.split("\n"))
        page = cls("\n".join("" if code else line for line, code in lines))
        page.anchors = set(re.findall(r'<a (?:id|name)="([^"]+)"', page.text))
        for heading in re.findall(r"^#{1,6} +(.+?) *#*$", page.text, re.M):
            explicit = re.search(r"\{[^}]*#([\w.:-]+)[^}]*\}\s*$", heading)
            if explicit:
                page.anchors.add(explicit[1])
            else:
                page.anchors |= set(_slugs(heading))
        page.text = re.sub(r"(`+)(.+?)\1", "", page.text)
        return page


def _slugs(heading: str) -> Iterator[str]:
    """How GitHub and how MkDocs call a heading in a link."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = re.sub(r"[`*]|<[^>]+>", "", plain).strip().lower()
    yield re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
    ascii_ = plain.encode("ascii", "ignore").decode()
    yield re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_).strip())


def _page(file: Path, reference: ModuleType, text: str | None = None) -> Page:
    """A page with what is filled in when the site is built."""
    text = file.read_text(encoding="utf-8") if text is None else text
    if DOCS in file.parents:
        text = reference.expanded(text, file.relative_to(DOCS).as_posix())
    return Page.of(text, reference)


def _broken(file: Path, reference: ModuleType, text: str | None = None) -> Iterator[str]:
    """Yield the relative links of a page that lead nowhere."""
    page = _page(file, reference, text)
    for target in re.findall(r"\]\(([^()\s]+)(?: \"[^\"]*\")?\)", page.text):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        other = Path(os.path.normpath(file.parent / path)) if path else file
        if not other.exists():
            yield f"{file.relative_to(ROOT)}: {target}: no such file"
        elif anchor and other.suffix == ".md":
            linked = _page(other, reference) if path else page
            if anchor not in linked.anchors:
                yield f"{file.relative_to(ROOT)}: {target}: no such heading"


def test_links_lead_to_files_and_headings(reference: ModuleType) -> None:
    assert len(PAGES) > 10
    assert [line for page in PAGES for line in _broken(page, reference)] == []


def test_a_broken_link_is_noticed(reference: ModuleType) -> None:
    text = "[a](gone.md) [b](concepts.md#nothing) [c](#there) [d](#not-there)\n# There\n"
    text += "```\n[e](gone.md)\n```\n`[f](gone.md)`"
    broken = [line.split(": ")[1] for line in _broken(DOCS / "index.md", reference, text)]
    assert broken == ["gone.md", "concepts.md#nothing", "#not-there"]


def test_pages_of_the_site_are_in_its_navigation(reference: ModuleType) -> None:
    """`make docs` refuses both as well: a page that no entry names, and an entry without a page."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed: set[str] = set()

    def walk(item: Any) -> None:
        if isinstance(item, str):
            listed.add(item)
        for inner in (
            item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        ):
            walk(inner)

    walk(settings["nav"])
    left_out = {line.removeprefix("/") for line in settings["exclude_docs"].split("\n")}
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - left_out
    assert listed == there


def test_generated_parts_are_on_their_pages(reference: ModuleType) -> None:
    for name, build in reference.GENERATED.items():
        on = name.replace("exit-code-table", "exit-codes")
        page = (DOCS / "reference" / f"{on}.md").read_text(encoding="utf-8")
        assert build() in reference.expanded(page, f"reference/{on}.md")
    with pytest.raises(KeyError):
        reference.expanded("<!-- generated: nothing -->\n<!-- end -->", "reference/cli.md")


def test_links_out_of_the_site_become_text_or_links_to_the_repository(
    reference: ModuleType,
) -> None:
    text = "See [results](../benchmarks/results/gpu.md) and [home](index.md), "
    text += "not `[x](../Makefile)`.\n```\n[y](../Makefile)\n```"
    kept = "not `[x](../Makefile)`.\n```\n[y](../Makefile)\n```"
    plain = reference.links_of_site(text, DOCS, "concepts.md")
    assert plain == f"See results (`benchmarks/results/gpu.md`) and [home](index.md), {kept}"
    linked = reference.links_of_site(text, DOCS, "concepts.md", "https://example.org/raypipe")
    assert "[results](https://example.org/raypipe/blob/main/benchmarks/results/gpu.md)" in linked
    assert reference.links_of_site("[a](../gone.txt)", DOCS, "concepts.md") == "[a](../gone.txt)"
    assert (
        reference.links_of_site("[a](docs/index.md)", ROOT, "project/changelog.md")
        == "[a](../index.md)"
    )


# -- examples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    code: str
    not_run: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks(file: Path) -> list[Block]:
    lines = file.read_text(encoding="utf-8").split("\n")
    blocks, start = [], -1
    for number, line in enumerate(lines):
        if start < 0 and line.startswith("```"):
            start = number
        elif start >= 0 and line.rstrip() == "```":
            before = next((text for text in reversed(lines[:start]) if text.strip()), "")
            marker = NOT_RUN.fullmatch(before.strip())
            language = lines[start].removeprefix("```").split("{")[0].strip()
            code = "\n".join(lines[start + 1 : number])
            blocks.append(Block(file.name, start + 1, language, code, marker[1] if marker else ""))
            start = -1
    assert start < 0, f"{file.name}:{start + 1}: a code block without an end"
    return blocks


def _shell_commands(block: Block) -> list[list[str]]:
    """The commands of a block; of a console, what follows a prompt."""
    code = block.code.replace("\\\n", " ")
    lines = [line.strip() for line in code.split("\n")]
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def _run_shell(block: Block) -> None:
    for words in _shell_commands(block):
        program = words[0].rsplit("/", 1)[-1]
        if program == "make":
            targets = re.findall(
                r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
            )
            assert set(words[1:]) <= set(targets), f"{block}: {shlex.join(words)}"
            words = ["raypipe", "demo"] if "demo" in words else []
        else:
            assert program == "raypipe", (
                f"{block}: {shlex.join(words)} is not a command that can be tested; mark it"
            )
        if not words:
            continue
        quick = (
            [f"--set={name}={value}" for name, value in QUICK.items()]
            if words[1] in ("run", "demo")
            else []
        )
        with contextlib.suppress(FileExistsError):
            os.mkdir("runs")
        result = CliRunner().invoke(cli.cli, [*words[1:], *quick])
        assert result.exit_code == 0, (
            f"{block}: {shlex.join(words)}: {result.output}{result.exception!r}"
        )


def _workspace(folder: Path) -> None:
    """Write what examples name: a folder of images, and a configuration for it."""
    images, labels = digit_pngs(400)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / "data" / "my-images" / f"class-{label}" / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    config: dict[str, Any] = {"run": "runs/first", "source": {"uri": "data/my-images"}}
    for name, value in QUICK.items():
        section, _, key = name.partition(".")
        config.setdefault(section, {})[key] = value
    (folder / "my.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_few_examples_are_not_run(page: Path) -> None:
    blocks = [block for block in _blocks(page) if block.language in ("python", "bash", "console")]
    skipped = [block for block in blocks if block.not_run]
    assert len(skipped) <= MOST_NOT_RUN
    assert len(skipped) < max(1, len(blocks))
    markers = NOT_RUN.findall(page.read_text(encoding="utf-8"))
    assert len(markers) == len(skipped), "a marker that no code block follows"
    languages = {block.language for block in _blocks(page)}
    assert not languages & {"sh", "shell", "py", "python3"}, "write bash and python, which are run"


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_examples_run(
    page: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All examples of a page, in their order and in one folder, as a reader runs them."""
    blocks = [block for block in _blocks(page) if not block.not_run]
    blocks = [block for block in blocks if block.language in ("python", "bash", "console")]
    assert blocks, f"{page.name} has no example that runs"
    _workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
        else:
            _run_shell(block)
