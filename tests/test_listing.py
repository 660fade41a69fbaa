"""The verb `list`, and the reading of signatures and docstrings behind it."""

from __future__ import annotations

import inspect
import re
import typing

import pytest
from conftest import ROOT

from lightning_atrous.complaints import Complaint
from lightning_atrous.heads import HEADS
from lightning_atrous.listing import tell_list
from lightning_atrous.signatures import Option, options_of, summary_of


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    tell_list(arguments)
    return capsys.readouterr().out


def words_of(text: str) -> str:
    """In one line, without the marks of code and the frame of a table."""
    return " ".join(re.sub("[`│]", "", text).split())


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_heads_and_their_options_fit_into_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = listed(capsys, "heads")
    assert max(map(len, shown.splitlines())) <= columns
    for name in HEADS:
        assert re.search(rf"^│ {name} ", shown, re.M)
        assert words_of(HEADS[name].paper) in words_of(shown)
        assert words_of(HEADS[name].__doc__.splitlines()[0]) in words_of(shown)
        for option, parameter in list(inspect.signature(HEADS[name]).parameters.items())[2:]:
            assert f" {option}={parameter.default!r} ".replace(", ", ",") in shown, "broken over lines"


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_head_in_detail(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = listed(capsys, "heads", name)
    assert max(map(len, shown.splitlines())) <= columns
    assert f"{HEADS[name].__module__}.{HEADS[name].__qualname__}" in shown
    # what the docstring says of the options, letter for letter, by an order of its own and no parser of docstrings
    arguments = inspect.getdoc(HEADS[name]).partition("Args:")[2].partition("\n\n")[0]
    written = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", arguments, re.M | re.S))
    for option, parameter in list(inspect.signature(HEADS[name]).parameters.items())[2:]:
        written_type = inspect.formatannotation(typing.get_type_hints(HEADS[name].__init__)[option])
        assert words_of(f"{option}={parameter.default!r} {written_type}") in words_of(shown)
        assert words_of(written[option]) in words_of(shown)


def test_some_heads_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in ("deeplabv3*", "labv3"):
        shown = listed(capsys, "heads", pattern)
        assert "│ deeplabv3 " in shown
        assert "│ deeplabv3plus " in shown
        assert "│ fcn " not in shown


def test_a_head_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Complaint, match="no head is named 'deeplabv4'; did you mean 'deeplabv3'") as complaint:
        tell_list(["heads", "deeplabv4"])
    assert complaint.value.exit_code == 2
    monkeypatch.setitem(HEADS.broken, "lost", "a-plugin (gone:Head): ModuleNotFoundError: gone")
    with pytest.raises(Complaint, match="the head 'lost' could not be imported from a-plugin"):
        tell_list(["heads", "lost"])


@pytest.mark.parametrize("name", sorted(HEADS))
def test_the_page_of_heads_is_made_from_these_heads(name: str) -> None:
    page = (ROOT / "docs" / "heads.md").read_text()
    section = page.partition(f"\n### {name}\n")[2].partition("\n##")[0]
    assert section, "not there; run benchmarks/heads.py docs/heads.md"
    assert summary_of(HEADS[name]) in section
    assert HEADS[name].paper in section
    rows = [f"| `{o.name}` | `{o.type}` | `{o.default}` | {o.words} |" for o in options_of(HEADS[name])]
    written = [line.replace("\\|", "|") for line in section.splitlines() if line.startswith("| `")]
    assert written == rows, "run benchmarks/heads.py docs/heads.md"


class Wall:
    """What is painted,
    and by whom.

    More of it.

    Args:
        width: In metres,
            measured along ``x``.
        coats: How many.
    """

    def __init__(self, width: int, *, coats: int = 2, primer: str | None = None, by) -> None: ...


class Fence(Wall):
    """A wall with gaps.

    Args:
        coats: More than on a wall.
    """


class Gate(Fence):
    def __init__(self, width: int, *, coats: int, locks: tuple[int, ...] = (1, 2)) -> None:
        """Make it.

        Args:
            locks: Their heights,
                from below.
        """


def test_options_as_they_are_written() -> None:
    assert options_of(Wall) == (
        Option("coats", "int", "2", "How many."),
        Option("primer", "str | None", "None", ""),
        Option("by", "", None, ""),
    )
    assert [option.words for option in options_of(Fence)] == ["More than on a wall.", "", ""]
    assert options_of(Gate) == (
        Option("coats", "int", None, "More than on a wall."),
        Option("locks", "tuple[int, ...]", "(1, 2)", "Their heights, from below."),
    )
    assert list(map(str, options_of(Gate))) == ["coats", "locks=(1, 2)"]
    assert list(map(summary_of, (Wall, Fence, Gate))) == ["What is painted, and by whom.", "A wall with gaps.", ""]


Colour = typing.Literal["red", "blue"]


class Box:
    def __init__(self, *, size=None) -> None: ...


class Bag:
    def __init__(self, *, colour: Colour | None = None) -> None: ...


class Sack:
    def __init__(self, *, colour: Unknown = "red") -> None: ...  # noqa: F821


def test_types_that_are_no_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Box.__init__.__annotations__, "size", tuple[int, ...] | None)
    assert options_of(Box) == (Option("size", "tuple[int, ...] | None", "None", ""),)


def test_aliases_are_resolved_where_they_are_known() -> None:
    assert options_of(Bag)[0].type == "Optional[Literal['red', 'blue']]"
    assert options_of(Sack)[0].type == "Unknown"
