"""Attacks: triggers, targets, poisoned rows, and models with an implanted backdoor."""
