"""Invariance: backdoor removal by teaching a model that insertions into a prompt must not change its answer."""
