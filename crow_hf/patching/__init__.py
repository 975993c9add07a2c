"""Entropy patching: from text or bytes to rows of patched bytes."""
