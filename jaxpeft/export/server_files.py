"""What the adapter files of servers have in common: they hold low-rank updates of one rank and one
scale, of a language model of a known architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from jaxpeft.core import paths
from jaxpeft.core.folding import can_fold, fold_site, parts_that_add
from jaxpeft.core.paths import Tree
from jaxpeft.core.targets import KINDS, find_sites
from jaxpeft.errors import ConfigError
from jaxpeft.export.export_job import Job, Report, Target, size_of
from jaxpeft.export.probe import ROWS, TOLERANCE, gap_of, logits, require_equal
from jaxpeft.export.request import ExportRequest, kinds_of, reads_elsewhere, with_jaxpeft
from jaxpeft.export.updates import Update, is_low_rank, uniform, updates_of, with_updates
from jaxpeft.hub.adapters.adapter_folder import AdapterFolder
from jaxpeft.hub.adapters.folder_layout import CONFIG
from jaxpeft.hub.loading import Outline
from jaxpeft.json_files import read_json
from jaxpeft.methods import MARKERS
from jaxpeft.models.base import Pretrained
from jaxpeft.quant.quantize import dequantize


@dataclass(frozen=True)
class ServerFiles:
    """The adapter files of a server.

    Attributes:
        library: the server, for messages.
        embeddings: for each `model_type` that it runs, whether it holds updates of the embedding
            and of the language-model head.
        magnitudes: whether it holds DoRA's magnitudes.
        most_rank: the largest rank; None for any.
        needs: raises an error if a package is missing.
        write: writes the files of a job into a folder.
        read: reads them again, as the server does.
        usage: the text that says how to serve the output.
    """

    library: str
    embeddings: Mapping[str, bool]
    write: Callable[[Job, Sequence[Update], Path], None]
    read: Callable[[Job, Path], list[Update]]
    usage: Callable[[Job, Sequence[Update]], str]
    magnitudes: bool = False
    most_rank: int | None = None
    needs: Callable[[], None] = lambda: None


def server_target(holds: str, files: ServerFiles) -> Target:
    """Return the target that writes the files of a server.

    Args:
        holds: what it can hold, for the documentation.
        files: the files.
    """
    return Target(holds, partial(_require, files), partial(_export, files))


def _require(
    files: ServerFiles, request: ExportRequest, adapter: AdapterFolder, outline: Outline
) -> None:
    """Raise an error if the server cannot hold the adapter, as far as its options tell.

    Raises:
        ConfigError: It cannot; the message gives all reasons, and a target that can.
    """
    files.needs()
    kinds, model_type = kinds_of(adapter), str(outline.config["model_type"])
    problems = [
        f"{kind.name} is no low-rank update of linear modules"
        for kind in kinds
        if not is_low_rank(kind)
    ]
    if outline.model.options.task != "causal_lm":
        problems.append(f"the task is {outline.model.options.task}, not causal_lm")
    elif model_type not in files.embeddings:
        known = ", ".join(files.embeddings)
        problems.append(f"the architecture is {model_type}, not one of {known}")
    added = outline.model.config.vocab_size - int(outline.config["vocab_size"])
    if added > 0:
        problems.append(f"the model has {added} added tokens, which the base of a server has not")
    for part in adapter.parts:
        saved = read_json(part / CONFIG).get("modules_to_save")
        if saved:
            problems.append(f"modules_to_save is {saved}, which are trained in full")
    if problems:
        raise refusal(request, files, problems, outline.model, all(map(can_fold, kinds)))


def refusal(
    request: ExportRequest,
    files: ServerFiles,
    problems: Sequence[str],
    model: Pretrained,
    mergeable: bool,
) -> ConfigError:
    """Return the error of a target that cannot hold an adapter.

    Args:
        request: the request.
        files: the files of the target.
        problems: the reasons.
        model: the base.
        mergeable: whether plain weights can express the adapter.
    """
    if reads_elsewhere(model):
        fix = with_jaxpeft(request.adapter, model, request.pooling)
    elif mergeable:
        fix = "use --to merged, and serve the merged model"
    else:
        fix = "use --to peft, which holds every method, and load it with jaxpeft or peft"
    return ConfigError(
        [f"--to {request.to}: {files.library} cannot hold it: {why}; {fix}" for why in problems]
    )


def _export(files: ServerFiles, job: Job, folder: Path) -> Report:
    out, model = job.request.out, job.outline.model
    found, problems = updates_of(job.method, job.params)
    problems += _limits(files, found, job)
    if problems:
        raise refusal(job.request, files, problems, model, _can_merge(job))
    wanted = logits(model, job.params, job.method)
    updates = uniform(found)
    files.write(job, updates, folder)
    _, loaded = with_updates(files.read(job, folder), job.base)
    gap = gap_of(logits(model, loaded), wanted)
    require_equal(gap, wanted, TOLERANCE, f"{out}: the exported adapter, read again")
    weights = [
        str(file.relative_to(folder))
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".gguf")
    ]
    what = f"{job.method.name} for {files.library}, rank {updates[0].rank}"
    lines = (
        f"wrote {out}: {what}, {size_of(folder, weights)}",
        f"largest logit difference after loading: {gap:.2g} ({ROWS} rows of random tokens)",
        files.usage(job, updates),
    )
    return Report(lines, gap)


def _can_merge(job: Job) -> bool:
    """Return whether plain weights can hold the adapter; a bias needs a place in the base."""
    parts = parts_that_add(job.method, MARKERS)
    names = [name for part in parts for name in part.leaves.root]
    roots = {name: job.params[name] for name in names if name in job.params}

    def fold(params: Tree) -> None:
        tree = dequantize(params) if job.outline.plan.held else params
        for site in find_sites(tree, KINDS):
            fold_site(parts, site, paths.get(tree, site.path), roots)

    try:
        jax.eval_shape(fold, job.params)
    except ConfigError:
        return False
    return True


def _limits(files: ServerFiles, updates: Sequence[Update], job: Job) -> list[str]:
    """Return which updates exceed what the server can hold."""
    problems: list[str] = []
    rank = max((one.rank for one in updates), default=0)
    if files.most_rank is not None and rank > files.most_rank:
        problems.append(f"the rank is {rank}, above {files.most_rank}")
    scaled = [one.module for one in updates if one.magnitude is not None]
    if scaled and not files.magnitudes:
        problems.append(f"{scaled[0]} has a magnitude, as in DoRA")
    elif scaled and len(scaled) < len(updates):
        problems.append("some modules have a magnitude, as in DoRA, and others have none")
    tied = "lm_head" not in job.base
    for one in updates:
        whole = one.embedding or one.module == "lm_head"
        if whole and not files.embeddings[str(job.outline.config["model_type"])]:
            problems.append(f"{one.module} is adapted, but only modules of layers can be")
        elif one.embedding and one.magnitude is not None:
            problems.append(f"{one.module} is an embedding with a magnitude")
        elif one.embedding and tied:
            problems.append(
                f"{one.module} is adapted for the token lookup alone, but is also the head"
                " (tie_word_embeddings)"
            )
    return problems
