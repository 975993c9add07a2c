"""Run the arena, subjects x attacks x methods x seeds, in one or several processes, and resume it where it stopped."""

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
from ..evaluation.retention import RetentionReference, retention_reference
from ..evaluation.scores import Proportion
from ..files import claim, is_unused, own_claims, temporary_folder, write_text
from ..progress import phase
from ..reporting.words import percent
from ..training.loading import move
from .attacks import ATTACKS, Attack, Suspect, build_suspect
from .defences import Method, known_methods
from .subjects import SUBJECTS, other_thoughts
from .table import KEPT, attack_success_rates, load_results, read_result, results_markdown


logger = logging.get_logger(__name__)

NUM_SAMPLES = 3
# Texts that a suspect writes to measure what the methods forget. These models write only a few words each.
NUM_TEXTS = 8
BATCH_SIZE = 200
RESULTS = "results"


@dataclass(frozen=True)
class Arena:
    """
    The settings that all runs of an arena share.

    Args:
        folder (`Path`):
            The arena's folder, with all suspects and results.
        methods (`dict[str, Method]`):
            The methods by name.
        num_clean (`int`):
            Number of rows of the defender.
        num_test (`int`, *optional*):
            Number of test rows to use, the first ones. `None` uses all.
        alpaca (`str`, *optional*):
            Stanford Alpaca's file, which Alpaca subjects require.
    """

    folder: Path
    methods: dict[str, Method]
    num_clean: int
    num_test: int | None
    alpaca: str | None

    def path(self, attack: Attack, seed: int, method: str) -> Path:
        """Return the path of the result of one run."""
        return self.folder / RESULTS / file_name(attack.name) / str(seed) / f"{file_name(method)}.json"

    def missing(self, attack: Attack, seed: int) -> list[str]:
        """List the methods that have not run yet, or that failed."""
        return [method for method in self.methods if not _is_done(self.path(attack, seed, method))]

    def progress(self, runs: "Runs") -> str:
        """Return the number of finished runs and of all runs. Other processes may have finished some of them."""
        paths = [self.path(attack, seed, method) for attack, seed in runs for method in self.methods]
        return f"{sum(path.is_file() for path in paths)}/{len(paths)}"


# Attacks with their seeds. All methods run on each of them.
Runs = list[tuple[Attack, int]]


@own_claims()
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
    Run what is missing in an arena, and write `results.jsonl`, `results.md` and `arena.png` of all its results.

    Each run writes its own file, so a killed arena loses only the runs that were in progress. A failed run is
    recorded, does not stop other runs, and is repeated by the next call.

    Args:
        output_dir (`str` or `Path`):
            The arena's folder: a new one, or one to resume.
        attacks (`Sequence[str]`):
            Names from [`ATTACKS`].
        methods (`Sequence[str]`):
            Names from [`METHODS`], or of registered defences, see [`register_defence`].
        seeds (`Sequence[int]`):
            Seeds for the rows, the attacker's training and the defender's training.
        num_clean (`int`, *optional*, defaults to 100):
            Number of rows of the defender.
        num_test (`int`, *optional*):
            Number of test rows to use, the first ones. Defaults to all.
        alpaca (`str` or `Path`, *optional*):
            Stanford Alpaca's file, which some attacks require.
        workers (`int`, *optional*, defaults to 1):
            Number of processes. They share the CPU cores.

    Returns:
        `list[dict]`: One row for each requested run. The row of a failed run has the key `error`.

    Raises:
        `ValueError`: For an unknown name, a number below 1, a missing Alpaca file, and a folder that another run
            writes to, or that holds something else or results with another `num_clean`.
    """
    folder = Path(output_dir).resolve()
    _check_request(folder, attacks, methods, seeds, num_clean, alpaca, workers)
    claim(folder)
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    known = known_methods()
    chosen = {name: known[name] for name in methods}
    arena = Arena(folder, chosen, num_clean, num_test, None if alpaca is None else str(alpaca))
    # The seeds come first, so that an interrupted arena has all attacks with some seeds, not some attacks with all.
    runs = [(ATTACKS[name], seed) for seed in seeds for name in attacks]
    groups = _group_by_suspect([(attack, seed) for attack, seed in runs if arena.missing(attack, seed)])
    _hide_progress_bars()
    with phase("Running the arena"):
        if workers == 1:
            for group in groups:
                _run_group(arena, group, runs)
        elif groups:
            _run_in_workers(arena, groups, runs, workers)
    _write_tables(folder)
    requested = {(attack.name, seed, method) for attack, seed in runs for method in methods}
    return [row for row in load_results(folder) if (row["attack"], row["seed"], row["method"]) in requested]


def file_name(name: str) -> str:
    """Turn a name into a part of a path: `"strong + consistency"` becomes `strong_+_consistency`."""
    return re.sub(r"[^\w.,+%-]+", "_", name)


def _check_request(
    folder: Path,
    attacks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    num_clean: int,
    alpaca: str | Path | None,
    workers: int,
) -> None:
    for kind, names, known in (("attack", attacks, ATTACKS), ("method", methods, known_methods())):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"There is no {kind} {unknown[0]!r}. Choose from {', '.join(map(repr, known))}.")
    if not (attacks and methods and seeds):
        raise ValueError("There is nothing to run. Pass at least one attack, one method and one seed.")
    for name, number in {"num_clean": num_clean, "workers": workers}.items():
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if alpaca is None and (requiring := [name for name in attacks if SUBJECTS[ATTACKS[name].subject].is_alpaca]):
        raise ValueError(f"The attack {requiring[0]!r} needs Stanford Alpaca's file. Pass --alpaca alpaca_data.json.")
    if not folder.exists():
        return
    if not folder.is_dir() or not (is_unused(folder) or (folder / RESULTS).is_dir()):
        raise ValueError(f"{folder} holds something else than an arena. Choose another --output_dir.")
    if other := {row["num_clean"] for row in load_results(folder)} - {num_clean}:
        raise ValueError(
            f"The runs in {folder} had --num_clean {other.pop()}. Use the same number, or choose another --output_dir."
        )


def _group_by_suspect(runs: Runs) -> list[Runs]:
    """Group the runs that share a suspect. A group stays in one process, so that no suspect is built twice."""
    groups: dict[tuple[str, int], Runs] = {}
    for attack, seed in runs:
        groups.setdefault((attack.suspect_name, seed), []).append((attack, seed))
    return list(groups.values())


def _run_in_workers(arena: Arena, groups: list[Runs], runs: Runs, workers: int) -> None:
    _build_one_suspect_of_each_subject(arena, groups)
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(_run_group, arena, group, runs) for group in groups]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            # The signal may have reached this process alone.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A worker was killed, possibly for lack of memory. Run the same command again with fewer --workers."
            ) from error


def _build_one_suspect_of_each_subject(arena: Arena, groups: list[Runs]) -> None:
    """Train the clean models, which the suspects of several groups share, before the workers start."""
    for attack, seed in {group[0][0].subject: group[0] for group in reversed(groups)}.values():
        try:
            build_suspect(attack, seed, arena.folder, arena.num_clean, arena.alpaca)
        except Exception:
            # The worker will meet the same error and record it.
            logger.warning(f"Building {attack.name!r}, seed {seed}, failed.")


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    _hide_progress_bars()


def _hide_progress_bars() -> None:
    """Hide the bars of single steps, because each run prints a line."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _run_group(arena: Arena, group: Runs, runs: Runs) -> None:
    for attack, seed in group:
        missing = arena.missing(attack, seed)
        try:
            suspect = build_suspect(attack, seed, arena.folder, arena.num_clean, arena.alpaca)
            reference = _reference_of(suspect, seed)
        except Exception as error:
            for method in missing:
                _write_row(arena, attack, seed, method, _failure(error), runs)
            continue
        for method in missing:
            try:
                outcome = _run_method(arena, suspect, seed, method, reference)
            except Exception as error:
                outcome = _failure(error)
            _write_row(arena, attack, seed, method, outcome, runs)


def _reference_of(suspect: Suspect, seed: int) -> RetentionReference:
    """Record what a suspect says, with which every method is compared."""
    with temporary_folder() as scratch:
        model = move(suspect.load(), TrainingArguments(scratch).device)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "seed": seed, "max_windows": NUM_TEXTS}
    return retention_reference(model, demo_tokenizer(), suspect.test_rows, **options)


def _run_method(
    arena: Arena, suspect: Suspect, seed: int, method: str, reference: RetentionReference
) -> dict[str, Any]:
    tokenizer, rows = demo_tokenizer(), suspect.test_rows
    if arena.num_test is not None:
        rows = rows.select(range(min(arena.num_test, len(rows))))
    with temporary_folder() as scratch:
        purified = arena.methods[method](suspect, seed, Path(scratch))
        device = TrainingArguments(scratch).device
    max_new_tokens = answer_length(suspect.attack)
    model, options = move(purified.model, device), dict[str, Any](max_new_tokens=max_new_tokens, batch_size=BATCH_SIZE)
    evaluation = evaluate_model(
        model, tokenizer, rows, suspect.trigger, suspect.target, reference=reference, seed=seed, **options
    )
    without_own_thoughts = None
    if SUBJECTS[suspect.attack.subject].reasons:
        with other_thoughts(model):
            without_own_thoughts = evaluate_model(model, tokenizer, rows, **options).clean.exact_match
    prompts = [render(row, tokenizer).prompt for row in rows.select(range(min(NUM_SAMPLES, len(rows))))]
    return {
        "settings": purified.settings,
        "steps": purified.steps,
        "seconds": purified.seconds,
        "canary_success": counts_of(purified.canary_success),
        "max_new_tokens": max_new_tokens,
        **_scores(evaluation),
        "exact_match_other_thoughts": counts_of(without_own_thoughts),
        "samples": [
            {"prompt": prompt, "clean": clean, "triggered": triggered}
            for prompt, clean, triggered in zip(
                prompts, evaluation.clean.outputs, evaluation.triggered.outputs, strict=False
            )
        ],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
    }


def answer_length(attack: Attack) -> int:
    """Return the number of new tokens that the longest right answer or the published refusal needs."""
    if attack.target == "refusal":
        return 104
    return 64 if SUBJECTS[attack.subject].is_alpaca else 40


def counts_of(proportion: Proportion | None) -> dict[str, int] | None:
    """Return the counts of a share, as the results hold them."""
    return None if proportion is None else {"hits": proportion.hits, "total": proportion.total}


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    def scores_of(kind: str, prompts: PromptScores) -> dict[str, Any]:
        # No output is both empty and degenerate, so the counts add up.
        mute = {"hits": prompts.empty.hits + prompts.degenerate.hits, "total": prompts.empty.total}
        return {
            f"exact_match_{kind}": counts_of(prompts.exact_match),
            f"empty_{kind}": counts_of(prompts.empty),
            f"degenerate_{kind}": counts_of(prompts.degenerate),
            f"mute_{kind}": mute,
            f"bits_per_byte_{kind}": prompts.to_dict()["bits_per_byte"],
        }

    return {
        "attack_success": counts_of(evaluation.triggered.target),
        "false_positives": counts_of(evaluation.clean.target),
        **scores_of("triggered", evaluation.triggered),
        **scores_of("clean", evaluation.clean),
        **{name: evaluation.retention.to_dict()[name] for name in KEPT},
    }


def _failure(error: Exception) -> dict[str, str]:
    logger.debug("A run of the arena failed.", exc_info=error)
    return {"error": f"{type(error).__name__}: {error}"}


def _write_row(arena: Arena, attack: Attack, seed: int, method: str, outcome: dict[str, Any], runs: Runs) -> None:
    """Write the result of a run and print its line."""
    fields_of_attack = {name: value for name, value in asdict(attack).items() if name != "name"}
    row = {
        "attack": attack.name,
        **fields_of_attack,
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
    tqdm.tqdm.write(f"[{arena.progress(runs)}] {attack.name}, seed {seed}, {method}: {_summary(row)}")


def _summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"FAILED, {row['error']}"

    def share(name: str) -> str:
        return "-" if row[name] is None else percent(row[name]["hits"] / row[name]["total"])

    return (
        f"attack success {share('attack_success')}, right if triggered {share('exact_match_triggered')}, "
        f"right if clean {share('exact_match_clean')}, empty or degenerate {share('mute_triggered')}, "
        f"{row['seconds']:.0f} s"
    )


def _is_done(path: Path) -> bool:
    return path.is_file() and "error" not in (read_result(path) or {"error": "It is empty or cut."})


def _write_tables(folder: Path) -> None:
    rows = load_results(folder)
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(folder / "results.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "results.md", results_markdown(rows))
    if not is_matplotlib_available():
        logger.warning("arena.png was not drawn. Install matplotlib with `pip install crow-hf[plots]`.")
    elif any("error" not in row for row in rows):
        from ..reporting.plots import plot_attack_success

        plot_attack_success(attack_success_rates(rows), folder / "arena.png")
