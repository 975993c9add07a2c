"""Tests of reading options and names without importing the modules that define them."""

import dataclasses

import pytest

from crow_hf.attacks.targets import TARGETS
from crow_hf.attacks.triggers import TRIGGERS
from crow_hf.cli.sources import PACKAGE, names_in, options_in, options_of, values_in
from crow_hf.models.boundaries import RULES, UNITS
from crow_hf.recipes.presets import PAPER, RECIPES


@pytest.mark.parametrize(
    ("path", "name", "known"),
    [
        ("attacks/triggers.py", "TRIGGERS", TRIGGERS),
        ("attacks/targets.py", "TARGETS", TARGETS),
        ("models/boundaries.py", "RULES", RULES),
        ("models/boundaries.py", "UNITS", UNITS),
        ("recipes/presets.py", "RECIPES", RECIPES),
    ],
)
def test_names_are_those_of_the_module(path, name, known):
    assert names_in(PACKAGE / path, name) == list(known)


def test_values_are_those_of_the_module():
    assert values_in(PACKAGE / "recipes" / "presets.py", "PAPER") == PAPER


def test_a_name_that_moved_is_an_error():
    with pytest.raises(LookupError, match="assigns no NOTHING"):
        names_in(PACKAGE / "recipes" / "presets.py", "NOTHING")


SOURCE = """
import somewhere

@dataclass
class Arguments(Base):
    folder: str = field(metadata={"help": "A folder."})
    rate: float | None = field(default=None, metadata={"help": "A " "rate."})
    kind: str = field(default="a", metadata={"help": f"{somewhere}", "choices": ["a", "b"]})
    strategy: IntervalStrategy | str = field(default=somewhere.default, metadata={"help": "When."})
    names: list[str] = field(default_factory=list, metadata={"help": "Names."})
    hidden: int = field(init=False, default=1)
    constant: int = 3
"""


def test_options_of_a_source(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    found = {each.name: each for each in options_in(tmp_path / "module.py", "Arguments")}
    assert list(found) == ["folder", "rate", "kind", "strategy", "names"]
    assert found["folder"].default is dataclasses.MISSING
    assert found["rate"].default is found["names"].default is None
    assert (found["rate"].kind, found["rate"].help) == ("float | None", "A rate.")
    assert (found["kind"].default, found["kind"].choices, found["kind"].help) == ("a", ("a", "b"), "")
    # The default is computed, and the choices are those of the enumeration of transformers.
    assert (found["strategy"].default, found["strategy"].choices) == (None, ("no", "steps", "epoch"))


def test_options_of_a_class():
    @dataclasses.dataclass
    class Arguments:
        folder: str
        rate: float | None = dataclasses.field(default=None, metadata={"help": "A rate.", "choices": [1.0]})

    folder, rate = options_of(Arguments)
    assert folder.default is dataclasses.MISSING and folder.kind == "str"
    assert (rate.kind, rate.help, rate.choices) == ("float | None", "A rate.", (1.0,))
