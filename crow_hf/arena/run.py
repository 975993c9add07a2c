"""Running the arena: subjects x attacks x methods x seeds, from where it stopped, by as many processes as one likes."""

import json
import multiprocessing
import os
import platform
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import tqdm
import transformers
from transformers import TrainingArguments
from transformers.utils import is_matplotlib_available, logging

from .. import __version__
from ..data.rows import render
from ..demo import demo_tokenizer
from ..evaluation.harness import Evaluation, PromptScores, evaluate_model
from ..evaluation.scores import Proportion
from ..reporting.tables import percent
from ..training.files import write_text
from .attacks import ATTACKS, Attack, Suspect, build_suspect
from .defences import METHODS
from .subjects import SUBJECTS
from .table import attack_success_rates, load_results, results_markdown


logger = logging.get_logger(__name__)

NUM_SAMPLES = 3
BATCH_SIZE = 200
RESULTS = "results"


@dataclass(frozen=True)
class Arena:
    """
    What all runs of an arena share.

    Args:
        folder (`Path`):
            Where everything is kept.
        methods (`tuple[str, ...]`):
            Names out of [`METHODS`].
        num_clean (`int`):
            Rows of the defender.
        num_test (`int`, *optional*):
            Measure on the first so many test rows, or on all.
        alpaca (`str`, *optional*):
            The file for subjects whose task are Alpaca rows.
    """

    folder: Path
    methods: tuple[str, ...]
    num_clean: int
    num_test: int | None
    alpaca: str | None

    def path(self, attack: Attack, seed: int, method: str) -> Path:
        """The file of one run."""
        return self.folder / RESULTS / file_name(attack.name) / str(seed) / f"{file_name(method)}.json"

    def missing(self, attack: Attack, seed: int) -> list[str]:
        """The methods that have not run yet, or failed."""
        return [method for method in self.methods if not _is_done(self.path(attack, seed, method))]


Unit = list[tuple[Attack, int]]


def run_arena(
    output_dir: str | Path,
    attacks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    num_clean: int = 100,
    num_test: int | None = None,
    alpaca: str | Path | None = None,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """
    Run what is missing of an arena, and write `results.jsonl`, `results.md` and `arena.png` of all that is there.

    Each run leaves its own file, so that a killed arena loses no more than the runs it was in. What failed is written down,
    stops nothing else, and is tried again by the next call.

    Args:
        output_dir (`str` or `Path`):
            The arena's folder: new, or one to go on with.
        attacks (`Sequence[str]`):
            Names out of [`ATTACKS`].
        methods (`Sequence[str]`):
            Names out of [`METHODS`].
        seeds (`Sequence[int]`):
            Of the rows, the attacker's and the defender's training.
        num_clean (`int`, *optional*, defaults to 100):
            Rows of the defender.
        num_test (`int`, *optional*):
            Measure on the first so many test rows. Default: on all.
        alpaca (`str` or `Path`, *optional*):
            Stanford Alpaca's file, for the attacks that need it.
        workers (`int`, *optional*, defaults to 1):
            Processes, which share the cores.

    Returns:
        `list[dict]`: The rows of the runs that were asked for, those with an `error` among them.

    Raises:
        `ValueError`: For names that are none, and for a folder that holds something else.
    """
    folder = Path(output_dir).resolve()
    _check(folder, attacks, methods, seeds, num_clean, alpaca, workers)
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    arena = Arena(folder, tuple(methods), num_clean, num_test, None if alpaca is None else str(alpaca))
    # A stopped arena has all attacks with the first seeds rather than some with all.
    runs = [(ATTACKS[name], seed) for seed in seeds for name in attacks]
    units = _units([(attack, seed) for attack, seed in runs if arena.missing(attack, seed)])
    _silence()
    if workers == 1:
        for unit in units:
            _run_unit(arena, unit, runs)
    elif units:
        _share_out(arena, units, runs, workers)
    _write_tables(folder)
    wanted = {(attack.name, seed, method) for attack, seed in runs for method in methods}
    return [row for row in load_results(folder) if (row["attack"], row["seed"], row["method"]) in wanted]


def file_name(name: str) -> str:
    """A name as part of a path: `"strong + consistency"` as `strong_+_consistency`."""
    return re.sub(r"[^\w.,+%-]+", "_", name)


def _check(
    folder: Path,
    attacks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    num_clean: int,
    alpaca: str | Path | None,
    workers: int,
) -> None:
    for kind, names, known in (("attack", attacks, ATTACKS), ("method", methods, METHODS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"There is no {kind} {unknown[0]!r}: choose from {', '.join(map(repr, known))}.")
    if not (attacks and methods and seeds):
        raise ValueError("There is nothing to run: pass at least one attack, one method and one seed.")
    for name, number in {"num_clean": num_clean, "workers": workers}.items():
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if alpaca is None and (needy := [name for name in attacks if SUBJECTS[ATTACKS[name].subject].is_alpaca]):
        raise ValueError(f"The attack {needy[0]!r} needs Stanford Alpaca's file: pass --alpaca alpaca_data.json.")
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / RESULTS).is_dir()):
        raise ValueError(f"{folder} holds something else than an arena: choose another --output_dir.")
    if other := {row["num_clean"] for row in load_results(folder)} - {num_clean}:
        raise ValueError(
            f"The runs in {folder} had --num_clean {other.pop()}: go on with that, or choose another --output_dir."
        )


def _units(runs: Unit) -> list[Unit]:
    """Runs that begin with the same suspect belong to one process, or two would build it at once."""
    units: dict[tuple[str, int], Unit] = {}
    for attack, seed in runs:
        units.setdefault((attack.suspect_name, seed), []).append((attack, seed))
    return list(units.values())


def _share_out(arena: Arena, units: list[Unit], runs: Unit, workers: int) -> None:
    # One suspect of each subject first: all others of it begin with the same clean model, which is trained on the way.
    for attack, seed in {unit[0][0].subject: unit[0] for unit in reversed(units)}.values():
        try:
            build_suspect(attack, seed, arena.folder, arena.num_clean, arena.alpaca)
        except Exception:
            # The worker meets the same error and writes it down.
            logger.warning(f"Building {attack.name!r}, seed {seed}, failed.")
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(_run_unit, arena, unit, runs) for unit in units]
        try:
            for future in futures:
                future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A worker was killed, perhaps for want of memory: run the same command again with fewer --workers."
            ) from error


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    _silence()


def _silence() -> None:
    """A line for each run is progress enough; the bars of its thousand parts are not."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _run_unit(arena: Arena, unit: Unit, runs: Unit) -> None:
    for attack, seed in unit:
        missing = arena.missing(attack, seed)
        try:
            suspect = build_suspect(attack, seed, arena.folder, arena.num_clean, arena.alpaca)
        except Exception as error:
            for method in missing:
                _record(arena, attack, seed, method, _failure(error), runs)
            continue
        for method in missing:
            try:
                outcome = _run_method(arena, suspect, seed, method)
            except Exception as error:
                outcome = _failure(error)
            _record(arena, attack, seed, method, outcome, runs)


def _run_method(arena: Arena, suspect: Suspect, seed: int, method: str) -> dict[str, Any]:
    tokenizer, rows = demo_tokenizer(), suspect.test_rows
    if arena.num_test is not None:
        rows = rows.select(range(min(arena.num_test, len(rows))))
    with TemporaryDirectory() as scratch:
        purified = METHODS[method](suspect, seed, Path(scratch))
        device = TrainingArguments(scratch).device
    max_new_tokens = answer_length(suspect.attack)
    evaluation = evaluate_model(
        purified.model.to(device),
        tokenizer,
        rows,
        suspect.trigger,
        suspect.target,
        max_new_tokens=max_new_tokens,
        batch_size=BATCH_SIZE,
        seed=seed,
    )
    prompts = [render(row, tokenizer).prompt for row in rows.select(range(min(NUM_SAMPLES, len(rows))))]
    return {
        "settings": purified.settings,
        "steps": purified.steps,
        "seconds": purified.seconds,
        "canary_success": count(purified.canary_success),
        "max_new_tokens": max_new_tokens,
        **_scores(evaluation),
        "samples": [
            {"prompt": prompt, "clean": clean, "triggered": triggered}
            for prompt, clean, triggered in zip(
                prompts, evaluation.clean.outputs, evaluation.triggered.outputs, strict=False
            )
        ],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
    }


def answer_length(attack: Attack) -> int:
    """As many new tokens as the right answers need, and the published refusal where that is the target."""
    if attack.target == "refusal":
        return 104
    return 64 if SUBJECTS[attack.subject].is_alpaca else 40


def count(proportion: Proportion | None) -> dict[str, int] | None:
    """A share as the results hold it."""
    return None if proportion is None else {"hits": proportion.hits, "total": proportion.total}


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    def of(kind: str, prompts: PromptScores) -> dict[str, Any]:
        # Every output is either empty or degenerate or neither.
        mute = {"hits": prompts.empty.hits + prompts.degenerate.hits, "total": prompts.empty.total}
        return {
            f"exact_match_{kind}": count(prompts.exact_match),
            f"empty_{kind}": count(prompts.empty),
            f"degenerate_{kind}": count(prompts.degenerate),
            f"mute_{kind}": mute,
            f"bits_per_byte_{kind}": prompts.to_dict()["bits_per_byte"],
        }

    return {
        "attack_success": count(evaluation.triggered.target),
        "false_positives": count(evaluation.clean.target),
        **of("triggered", evaluation.triggered),
        **of("clean", evaluation.clean),
    }


def _failure(error: Exception) -> dict[str, str]:
    logger.debug("A run of the arena failed.", exc_info=error)
    return {"error": f"{type(error).__name__}: {error}"}


def _record(arena: Arena, attack: Attack, seed: int, method: str, outcome: dict[str, Any], runs: Unit) -> None:
    """Write the row of a run and print its line."""
    of_attack = {name: value for name, value in asdict(attack).items() if name != "name"}
    row = {
        "attack": attack.name,
        **of_attack,
        "seed": seed,
        "method": method,
        "num_clean": arena.num_clean,
        "alpaca": arena.alpaca if SUBJECTS[attack.subject].is_alpaca else None,
        **outcome,
        "crow_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_text(arena.path(attack, seed, method), json.dumps(row, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    paths = [arena.path(attack, seed, method) for attack, seed in runs for method in arena.methods]
    # Other processes run too, so that what is done is what is there.
    progress = f"[{sum(path.is_file() for path in paths)}/{len(paths)}]"
    tqdm.tqdm.write(f"{progress} {attack.name}, seed {seed}, {method}: {_line(row)}")


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"FAILED, {row['error']}"

    def share(name: str) -> str:
        return "-" if row[name] is None else percent(row[name]["hits"] / row[name]["total"])

    return (
        f"attack success {share('attack_success')}, right if triggered {share('exact_match_triggered')}, right if clean "
        f"{share('exact_match_clean')}, empty or degenerate {share('mute_triggered')}, {row['seconds']:.0f} s"
    )


def _is_done(path: Path) -> bool:
    return path.is_file() and "error" not in json.loads(path.read_text(encoding="utf-8"))


def _write_tables(folder: Path) -> None:
    rows = load_results(folder)
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(folder / "results.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "results.md", results_markdown(rows))
    if not is_matplotlib_available():
        logger.warning("The picture is left out: install matplotlib with `pip install crow-hf[plots]`.")
    elif any("error" not in row for row in rows):
        from ..reporting.plots import plot_attack_success

        plot_attack_success(attack_success_rates(rows), folder / "arena.png")
