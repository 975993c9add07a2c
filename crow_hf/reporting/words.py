"""What every report says in the same words: outcomes of canaries, and shares in percent."""

# Outcomes of a canary.
DIED = "died"
LIVES = "lives"
NOT_LEARNED = "was not learned, so it shows nothing"
TOO_FEW_ROWS = "was not seen, but there are too few rows to be sure"
NOT_EVIDENCE = "is not evidence"


def percent(share: float) -> str:
    """Format a share: `0.125` becomes `12.5 %`."""
    return f"{100 * share:.1f} %"
