"""Draw docs/before_after.png, the picture of README.md, from the table of the real model in docs/results.md.

python docs/make_picture.py
"""

import re
from pathlib import Path


DOCS = Path(__file__).parent
PICTURE = DOCS / "before_after.png"
HEADING = "## What did the GPU run on a real model show?"
# The rows of the table that are shown, with their names in the picture and colours that colour-blind readers can tell
# apart (Okabe and Ito).
SHOWN = {
    "no defence": ("no defence", "#D55E00"),
    'CROW, `recipe="paper"`': ("CROW", "#56B4E9"),
    "`strong`, defaults": ("strong", "#0072B2"),
    "as published": ("never\nbackdoored", "#999999"),
}


def real_model() -> dict[str, tuple[str, str]]:
    """Return attack success (%) and bits per byte of WikiText-2, as results.md prints them, by row of the table."""
    section = (DOCS / "results.md").read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    attack, bits = table[0].index("attack success"), table[0].index("bits per byte of WikiText-2")
    rows = {row[0]: row for row in table}
    return {name: (re.match(r"[\d.]+", rows[row][attack])[0], rows[row][bits]) for row, (name, _) in SHOWN.items()}


def draw() -> None:
    from matplotlib.figure import Figure

    numbers = real_model()
    colours = [colour for _, colour in SHOWN.values()]
    figure = Figure(figsize=(12.8, 5.6), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.03)
    panels = [
        ("Does the backdoor still work?", "attack success, % (lower is better)", 0, 112, "{} %"),
        ("What else was forgotten?", "WikiText-2, bits per byte (lower is better)", 1, 1.9, "{}"),
    ]
    for axes, (title, label, column, top, form) in zip(figure.subplots(1, 2), panels, strict=True):
        values = [row[column] for row in numbers.values()]
        bars = axes.bar(list(numbers), [float(value) for value in values], color=colours, width=0.7)
        axes.bar_label(bars, [form.format(value) for value in values], fontsize=16, padding=3)
        axes.set_title(title, fontsize=18, loc="left", fontweight="bold")
        axes.set_ylabel(label, fontsize=14, labelpad=10)
        axes.set_xlabel("model", fontsize=15)
        axes.tick_params(labelsize=15)
        axes.set_ylim(0, top)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "SmolLM2-135M-Instruct with a BadNets refusal backdoor. 100 clean rows, one seed, H100", fontsize=17
    )
    figure.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    draw()
