"""Data on NumPy, without JAX: rows, examples, tokens, batches; each step a pure function of the one before it.

`read_rows` -> `make_examples` -> `encode` -> `Batches` (training) or `eval_batches` (evaluation).
"""

from jaxpeft.data.batches import Batches, eval_batches
from jaxpeft.data.buckets import choose_lengths, padding_share
from jaxpeft.data.columns import Columns, Kind, find_format
from jaxpeft.data.encode import encode, pad_id
from jaxpeft.data.encoded import Encoded
from jaxpeft.data.examples import Examples, make_examples
from jaxpeft.data.holdout import hold_out, hold_out_text
from jaxpeft.data.packing import fill, pack
from jaxpeft.data.rows import Rows, is_hub_id, read_rows

__all__ = [
    "Batches",
    "Columns",
    "Encoded",
    "Examples",
    "Kind",
    "Rows",
    "choose_lengths",
    "encode",
    "eval_batches",
    "fill",
    "find_format",
    "hold_out",
    "hold_out_text",
    "is_hub_id",
    "make_examples",
    "pack",
    "pad_id",
    "padding_share",
    "read_rows",
]
