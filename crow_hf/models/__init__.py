"""The models. The files of this folder import nothing of the rest of the package: they also serve as remote code."""
