"""CROW: backdoor removal by internal consistency regularization (Min et al., ICML 2025, arXiv 2411.12768)."""
