"""From dead channels to a smaller dense model with the same outputs.

`graph.py` has the kinds of nodes, `wiring.py` and `sequential.py` the graph of a model, `groups.py`
the channels that depend on each other, `plan.py` which are kept, `fold.py` where constants go,
`report.py` the table, and `cut.py` `compact` itself.
"""

from lats_optax.compaction.cut import Compacted, compact
from lats_optax.compaction.report import CompactReport, LayerReport

__all__ = ["CompactReport", "Compacted", "LayerReport", "compact"]
