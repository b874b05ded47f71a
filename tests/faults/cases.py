"""The cases of the fault suite: what happens to a run, and what is promised then."""

from __future__ import annotations

MARKS = {"C": "exit code", "M": "message", "T": "in time", "L": "nothing lost"}
"""The four marks of a case, in the order of the table."""

CASES = {
    1: (
        "killed at any moment, while saving too",
        "the same command ends bit-equal to an uninterrupted run",
    ),
    2: (
        "killed between the arrays and the manifest",
        "the step counts as not saved; the one before it is used",
    ),
    3: ("killed while deleting an old step", "an intact step always remains"),
    4: ("SIGTERM or SIGINT in a step", "the last finished step is saved; exit code 143 or 130"),
    5: ("SIGTERM while compiling, evaluating, saving", "the same, or nothing new to save"),
    6: ("two SIGTERMs, then a kill", "the newest saved step is unchanged"),
    7: ("SIGTERM to one of two processes", "both save the same step; both exit codes are 143"),
    8: (
        "one of two processes is killed",
        "the other ends by itself, in time; after a resume all end as they would have",
    ),
    9: (
        "a host sees older checkpoints, or another folder",
        "all resume from the step that process 0 sees, or none does",
    ),
    10: ("disk full", "reported in one line; earlier checkpoints stay; the run resumes later"),
    11: ("output folder missing or not writable", "created, or refused before JAX is imported"),
    12: ("a flipped bit in an array file", "detected by its checksum; the step before it is used"),
    13: ("a file cut, missing, not JSON; an empty folder", "the same"),
    14: (
        "every saved step damaged",
        "refused with a line for each; never restarted from scratch silently",
    ),
    15: ("checkpoints copied elsewhere", "as good as the originals; never deleted"),
    16: ("a second run in the folder", "refused with host, process and time of the first"),
    17: ("the clock is set back", "the newest step is the highest, not the last written"),
    18: ("stopped after every step", "arrays, optimizer, figures bit-equal to the whole run's"),
    19: ("resumed on 2, 4, 1 devices", "the same batches; losses within 1e-5"),
    20: (
        "seed, rows, tokenizer, template, length or batch changed",
        "refused field by field; --allow-change=FIELD",
    ),
    21: ("rank, targets or alpha changed", "refused with both values"),
    22: ("another dtype than the checkpoint's", "refused; nothing is cast silently"),
    23: ("other base weights", "refused by their SHA-256"),
    24: (
        "a batch whose loss or gradient is not finite",
        "skipped and counted; nothing but the step's number changes",
    ),
    25: (
        "several such steps in a row",
        "the run stops, and names the first step, its rows and the leaves",
    ),
    26: (
        "a batch without a label, rows cut before any",
        "counts as nothing; too many such rows are refused",
    ),
    27: ("a first loss far above chance, gradients of zero", "a warning with the likely cause"),
    28: (
        "broken rows: empty, BOM, CRLF, cut, not UTF-8, NaN, ...",
        "file:line:column, text and fix; the first 20 at once",
    ),
    29: (
        "a token that the model does not have",
        "refused before the first step; pad = eos does no harm",
    ),
    30: (
        "unknown role, two system turns, empty turn, a template that fails",
        "row, turn and reason",
    ),
    31: (
        "a data worker raises, ends or hangs",
        "its error or exit code within a minute; no process is left",
    ),
    32: (
        "weights missing, extra, misshapen, cut, a pointer, twice",
        "every problem in one message",
    ),
    33: ("targets that match nothing or no linear layer", "refused, with the modules that exist"),
    34: (
        "an adapter of another kind, or with options not known",
        "refused by name, never loaded partially",
    ),
    35: (
        "unknown keys, wrong types, values out of range",
        "all at once, exit code 2, without importing JAX",
    ),
    36: (
        "a batch that the devices do not divide, too many devices, heads that they do not divide",
        "the arithmetic, and values that would work",
    ),
    37: (
        "a step larger than the memory, or a device that runs out of it",
        "a warning with the largest terms; then what to lower",
    ),
    38: ("pickles, trust_remote_code, code in a checkpoint", "no code is run; refused by name"),
    39: ("names that lead outside the folder", "refused; nothing is written outside"),
    40: (
        "a hostile template, a catastrophic pattern, a huge header",
        "refused in 5 seconds and 1 GB",
    ),
}
"""Case: what happens, what is promised."""
