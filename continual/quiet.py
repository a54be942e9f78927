"""Silences what libraries say on every run and no user can act on; a run's own words stay readable."""

from __future__ import annotations

import logging
import os
import warnings


def is_first_started() -> bool:
    """Say whether this is the only process or the first of several, by what started it; true before there are more."""
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def quieten() -> None:
    """Quieten Lightning's tips, tokenizer threads and warnings about choices that are ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    fabric = ("lightning.fabric", "lightning.fabric.utilities.distributed")
    for name in ("lightning.pytorch", *fabric, "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*GPU available but not used.*",
        ".*Found .* module\\(s\\) in eval mode.*",
        ".*Trying to infer the `batch_size`.*",
        ".*litlogger.*",
        ".*sync_dist=True.*",
        ".*`loftq_config` specified but will be ignored.*",  # the resolved configuration says {} for "none"
    ):
        warnings.filterwarnings("ignore", message=message)
