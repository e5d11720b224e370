"""The compilers of a GPU that is not there: a device that can be compiled for and does nothing else.

Made through private functions of jax and jaxlib 0.10.2 and 0.11.2. XLA_FLAGS must be set before `load_plugin`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def load_plugin() -> str:
    """Loads JAX's plugin for CUDA, whichever is installed, and names it (xla_cuda12, xla_cuda13)."""
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    client: Any = xla_client
    jax.devices()  # finds the plugins, and loads what it can of them
    plugins = importlib.import_module("jax_plugins")
    names = [one.name for one in pkgutil.iter_modules(plugins.__path__) if one.name.startswith("xla_cuda")]
    if not names:
        raise SystemExit("no plugin for CUDA: pip install jax[cuda12] or jax[cuda13], no driver is needed")
    if not client.pjrt_plugin_loaded("cuda"):
        folder = Path(importlib.import_module(f"jax_plugins.{names[-1]}").__path__[0])
        client.load_pjrt_plugin_dynamically("cuda", str(folder / "xla_cuda_plugin.so"))
    if not client.pjrt_plugin_initialized("cuda"):
        client.initialize_pjrt_plugin("cuda")
    return names[-1]


def place_on(target: Path) -> NamedSharding:
    """Where arguments lie: on the one device of a topology that has the target's hardware. Its mesh must be JAX's
    abstract mesh while a Pallas kernel is lowered (`jax.sharding.use_abstract_mesh`): from 0.11.2 on, JAX asks it for
    the kind of GPU."""
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    jaxlib: Any = _jax
    options = {"target_config": target.read_text(), "topology": "1x1x1"}
    topology = jaxlib.get_default_c_api_topology("cuda", "", options)
    return NamedSharding(Mesh(np.array(topology._make_compile_only_devices()[:1]), "x"), PartitionSpec())
