"""`python -m crow_hf` is `crow-hf`, so that `accelerate launch -m crow_hf purify ...` starts it on every process."""

import sys

from .cli import main


sys.exit(main())
