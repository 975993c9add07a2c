"""The methods: CROW, Invariance, pruning and quantization baselines, and COCONUT's curriculum for thoughts."""
