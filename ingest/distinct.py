"""This module works on the distinct values of a column instead of its cells: a dataset has millions of the latter.

A text column of obs is kept as a pandas categorical, a byte or two for each cell; labels of cells stand once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def coded(values: pd.Series) -> tuple[NDArray[np.integer], list[Any]]:
    """Return each cell's code and the values that occur; what is missing is NaN, the last of them."""
    categories = values.astype("category").cat.remove_unused_categories().cat
    codes, distinct = categories.codes.to_numpy(), list(categories.categories)
    if (codes < 0).any():
        return np.where(codes < 0, len(distinct), codes.astype(np.int32)), [*distinct, np.nan]
    return codes, distinct


def spread(codes: NDArray[np.integer], texts: Sequence[Any]) -> pd.Categorical:
    """Return the column in which a cell of code ``k`` holds ``texts[k]``; equal texts become one category."""
    numbers, distinct = pd.factorize(np.array(texts, dtype=object))
    return pd.Categorical.from_codes(numbers[codes], categories=pd.Index(distinct))


def same(text: str, n_cells: int) -> pd.Categorical:
    """Return a column that holds one text everywhere."""
    return spread(np.zeros(n_cells, np.int8), [text])


def changed(values: pd.Series, change: Callable[[Any], Any]) -> pd.Categorical:
    """Change every distinct value once; what is missing is given as NaN."""
    codes, distinct = coded(values)
    return spread(codes, [change(value) for value in distinct])


def shown(value: Any) -> str:
    """Return a value as a message may show it, however long it is."""
    text = str(value)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
