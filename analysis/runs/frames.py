"""What a tidy frame is called in this package's annotations.

To a type checker it is ``Any``: pandas 3 annotates itself only in part, so that a column taken from a ``pd.DataFrame``
reads as a union of every type that it might be, and each use of one as an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

if TYPE_CHECKING:
    Frame: TypeAlias = Any
else:
    Frame = pd.DataFrame
