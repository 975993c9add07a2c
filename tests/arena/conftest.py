"""Fixtures of the arena's tests: few steps, and an arena on tiny suspects."""

import pytest

from crow_hf.arena import defences
from crow_hf.arena import run as arena_run
from crow_hf.arena.attacks import ATTACKS, Attack
from crow_hf.arena.defences import defence_config
from crow_hf.arena.run import run_arena
from helpers.arena import tiny_suspect


@pytest.fixture(autouse=True)
def few_views(monkeypatch):
    """Reduce the recipe `strong` and its control to two steps. The first has a learning rate of 0."""

    def config_with_few_views(recipe, scratch, seed, **changes):
        few = {"num_views": 32, "num_written_rows": 2} if recipe == "strong" else {}
        return defence_config(recipe, scratch, seed, **few | changes)

    monkeypatch.setattr(defences, "defence_config", config_with_few_views)


@pytest.fixture
def arena(tmp_path, monkeypatch):
    """
    A function that runs cheap methods on the attacks "tiny" and "tiny, again". Its attribute `built` lists the
    suspects that were requested.
    """

    def build(attack, seed, runs, num_clean, alpaca):
        built.append((attack.name, seed))
        return tiny_suspect(runs / "suspects" / str(seed), attack)

    built = []
    monkeypatch.setattr(arena_run, "build_suspect", build)
    for name in ("tiny", "tiny, again"):
        monkeypatch.setitem(ATTACKS, name, Attack(name))

    def run(methods=("none", "int8"), attacks=("tiny",), seeds=(0,), **options):
        return run_arena(tmp_path / "arena", attacks, methods, seeds, **options)

    run.folder, run.built = tmp_path / "arena", built
    return run
