"""The processor counts as eight devices, for tests of sharding; all others use the first.

Shapes and dtypes in signatures are checked while the tests run; costs nothing elsewhere.

Only where arrays are computed: what users pass in is checked by the library itself, and tested as such;
and the dataclasses of jaxrank.types hold whatever JAX puts in place of their arrays while it transforms them.
"""

import hypothesis  # noqa: F401  (its plugin for trio looks at what the garbage collector sees, which some tests freeze)
import jax
from jaxtyping import install_import_hook

install_import_hook(
    [
        f"jaxrank.{name}"
        for name in ("kernels", "models", "packing", "patches", "patch_rows", "research", "scoring", "tower")
    ],
    "beartype.beartype",
)
jax.config.update("jax_num_cpu_devices", 8)
