"""Types of the arrays that plans and batches are made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
SampleIds = npt.NDArray[np.uint32]  # numbers of samples; plans keep them in 32 bits
