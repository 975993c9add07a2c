"""Is the purification data itself poisoned? Finds rows with a piece that takes over the suspect's answers.

A poisoned row shows the trigger. Leave one piece of a prompt out: where that changes the suspect's answer most, the piece is
suspicious. Then put it into other prompts: if it takes over their answers too, the row is poisoned, and the piece is known.
"""

from dataclasses import dataclass

from datasets import Dataset
from transformers.utils import logging


logger = logging.get_logger(__name__)

LONGEST_PIECE = 6
NUM_PROBES = 8
# Share of the probed prompts whose answer a piece must take over.
MIN_TAKEN_OVER = 0.75


@dataclass
class Screening:
    """
    What [`screen_dataset`] found.

    Attributes:
        clean (`Dataset`):
            The rows that are left.
        suspicious (`list[int]`):
            The numbers of the rows that were taken out.
        pieces (`list[str]`):
            The piece of each of them that takes over the answers of other prompts.
    """

    clean: Dataset
    suspicious: list[int]
    pieces: list[str]
