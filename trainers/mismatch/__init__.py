"""Is the reward still buying quality? Pure statistics on reward and evaluations of the same policy versions.

from trainers.mismatch import from_table, judge
table = {"version": [0, 10, 20], "reward": [0.1, 0.4, 0.6], "gold": [1.0, 1.3, 1.1], "gold_se": [0.1, 0.1, 0.1]}
verdict = judge(from_table(table, evaluations=["gold"]))
print(verdict.state, verdict.since_version, verdict.primary.minimum_detectable_drop)
"""

from trainers.mismatch.alarm import Alarm, Fall, Settings, State, Verdict, judge
from trainers.mismatch.budget import Budget, Option, Scatter, Wanted, evaluation_budget, scatter
from trainers.mismatch.correlation import Correlation, between, correlate
from trainers.mismatch.early import Early, warn
from trainers.mismatch.findings import Findings, find, to_json
from trainers.mismatch.gap import Answers, Ratio, length_share, length_share_of_prompts, proxy_gold_gap, share_of_length
from trainers.mismatch.headroom import Forecast, Headroom, crps, crps_normal, forecast, headroom_within
from trainers.mismatch.paths import Law, fit_law
from trainers.mismatch.selection import (
    Choice,
    Estimate,
    Final,
    Rival,
    Selected,
    Shortlist,
    choose,
    report,
    rivals,
    shortlist,
)
from trainers.mismatch.series import Curve, Series, from_means, from_scores
from trainers.mismatch.sources import from_records, from_table

__all__ = [
    "Alarm",
    "Answers",
    "Budget",
    "Choice",
    "Correlation",
    "Curve",
    "Early",
    "Estimate",
    "Fall",
    "Final",
    "Findings",
    "Forecast",
    "Headroom",
    "Law",
    "Option",
    "Ratio",
    "Rival",
    "Scatter",
    "Selected",
    "Series",
    "Settings",
    "Shortlist",
    "State",
    "Verdict",
    "Wanted",
    "between",
    "choose",
    "correlate",
    "crps",
    "crps_normal",
    "evaluation_budget",
    "find",
    "fit_law",
    "forecast",
    "from_means",
    "from_records",
    "from_scores",
    "from_table",
    "headroom_within",
    "judge",
    "length_share",
    "length_share_of_prompts",
    "proxy_gold_gap",
    "report",
    "rivals",
    "scatter",
    "share_of_length",
    "shortlist",
    "to_json",
    "warn",
]
