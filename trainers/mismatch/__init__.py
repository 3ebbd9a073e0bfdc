"""Is the reward still buying quality? Pure statistics on reward and evaluations of the same policy versions."""

from trainers.mismatch.series import Curve, Series, from_means, from_scores
from trainers.mismatch.sources import from_records, from_table

__all__ = ["Curve", "Series", "from_means", "from_records", "from_scores", "from_table"]
