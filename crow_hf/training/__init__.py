"""What all methods share: loading a suspect, recording its layers, checkpoints, sharding, compilation and the Hub."""
