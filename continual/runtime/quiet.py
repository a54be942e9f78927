"""Silences what libraries say on every run and no user can act on; a run's own words stay readable."""

from __future__ import annotations

import logging
import os
import warnings

_SIGNALS = "pytorch.trainer.connectors.signal_connector"


def quieten() -> None:
    """Quieten Lightning's tips, tokenizer threads and warnings about choices that are ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # By their own names too: Lightning sets the level of its packages when they are imported.
    for name in ("pytorch", "fabric", "pytorch.utilities.rank_zero", "fabric.utilities.distributed", _SIGNALS):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it asks for a package that is not needed
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
