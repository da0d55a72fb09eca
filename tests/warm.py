"""What a server of processes imports and reads, so that none of the processes forked from it has to (tests/ranks.py)."""

import hamscale.analysis.disorder
import hamscale.analysis.spectra
import hamscale.analysis.tables
import hamscale.analysis.views
import hamscale.building
import hamscale.cli
import hamscale.evaluate
import hamscale.export.cp2k_runs
import hamscale.figures
import hamscale.page
import hamscale.paper
import hamscale.parallel.env
import hamscale.predict
import hamscale.train.loop
import hamscale.verify  # noqa: F401
from hamscale.dft.inputs import _grammar

_grammar()  # takes seconds
