"""Snakemake that asks Slurm every second what became of its jobs. The executor asks ever less often, 10 s later each time."""

import sys

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

Executor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, seconds: None)
sys.exit(main())
