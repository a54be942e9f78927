"""What stages cost the model's general ability: its log-likelihood on prose that no stage trains on."""

from __future__ import annotations

import numpy as np

from analysis.runs.frames import Frame
from analysis.runs.load import Run


def general_ability(run: Run) -> Frame:
    """Return, for each scored stage, the mean log-likelihood a token (``value``, nats) and its relative ``change``.

    The change is (value - value at stage 0) / |value at stage 0|: negative means that ability was lost. It is NaN
    where stage 0 was not recorded; a run that recorded nothing gives no lines.
    """
    rows = run.tables["general"]
    rows = rows[rows["metric"] == "log_likelihood_nats"].drop_duplicates("stage", keep="last").sort_values("stage")
    first = rows.loc[rows["stage"] == 0, "value"]
    start = float(first.iloc[0]) if len(first) else np.nan
    return rows[["stage", "value", "count"]].assign(change=(rows["value"] - start) / abs(start)).reset_index(drop=True)
