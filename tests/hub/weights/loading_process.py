"""One of several processes that load a model:
`python -m tests.hub.weights.loading_process PORT COUNT INDEX FOLDER OPTIONS`.

OPTIONS are JSON: `way` of `spreading.places`, `mesh`, and arguments of `outline`. Prints one JSON
line: the bytes that it read, those that its devices hold (each once), and the SHA-256 of every
leaf, put together from all processes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any


def main(port: str, count: str, index: str, folder: str, text: str) -> None:
    """Loads, and says what came of it."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    from jaxpeft.core import paths
    from jaxpeft.hub.base_identity import fingerprint
    from jaxpeft.hub.loading import outline
    from tests.hub.weights.spreading import mesh_of, places, requested

    options: dict[str, Any] = json.loads(text)
    mesh, way = mesh_of(options.pop("mesh")), options.pop("way")
    found = outline(folder, requested("causal_lm", **options))
    params = found.read(0, places(found.leaves, mesh, way))
    digests = {}
    for path, leaf in paths.walk(params):
        whole = np.asarray(process_allgather(leaf, tiled=True))
        digests[paths.text(path)] = hashlib.sha256(
            np.ascontiguousarray(whole).tobytes()
        ).hexdigest()
    parts = [
        {str(s.index): s.data.nbytes for s in leaf.addressable_shards}
        for leaf in jax.tree.leaves(params)
    ]
    held = sum(sum(part.values()) for part in parts)
    result = {
        "asked": found.meter.bytes,
        "held": held,
        "sha256": digests,
        "base": fingerprint(found.model.source),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    if int(count) > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
