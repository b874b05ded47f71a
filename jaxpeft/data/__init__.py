"""The data pipeline, with NumPy and without JAX: rows, examples, tokens, batches.

`read_rows` -> `make_examples` -> `encode` -> `Batches` (training) or `eval_batches` (evaluation).
Each step is a pure function of the previous one.
"""

from jaxpeft.data.batches.training import Batches, eval_batches
from jaxpeft.data.examples.make import Examples, make_examples
from jaxpeft.data.rows.columns import Columns, Kind, find_format
from jaxpeft.data.rows.holdout import hold_out, hold_out_text
from jaxpeft.data.rows.read import Rows, is_hub_id, read_rows
from jaxpeft.data.tokens.buckets import choose_lengths, padding_share
from jaxpeft.data.tokens.encode import encode, pad_id
from jaxpeft.data.tokens.packing import fill, pack
from jaxpeft.data.tokens.token_arrays import Encoded

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
