"""`python -m qwen_rt` is the command `qwen-rt`."""

import sys

from qwen_rt.cli import main

sys.exit(main())
