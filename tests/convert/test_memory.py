"""Loading, converting and restoring take the weights' own size and little more. Measured in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_bge

MEASURE = """
import sys, jax
from pathlib import Path
from jaxrank import convert
from jaxrank.weights import converted as checkpoint
from jaxrank.sharding import make_mesh
jax.config.update("jax_num_cpu_devices", 8)
jax.block_until_ready(jax.device_put(0.0))

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

action, folder, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
if action == "convert":
    import orbax.checkpoint
before = peak()
if action == "load":
    model = convert.load(folder, dtype=dtype)
elif action == "round":
    model = convert.load(folder, dtype=dtype, quantization="int8")
elif action == "convert":
    convert.convert(folder, folder / dtype, dtype=dtype, progress=False)
elif action.startswith("restore") and action != "restore over a mesh":
    model = checkpoint.load(folder / dtype, dtype="bfloat16", quantization="int8" if action == "restore int8" else None)
else:
    prepare = checkpoint.prepare if action == "restore over a mesh" else convert.prepare
    folder = folder / dtype if action == "restore over a mesh" else folder
    # two copies, each over four devices: here, in host memory, both are one
    model = prepare(folder, dtype="bfloat16")(make_mesh(jax.devices(), 4), stacked=True)
print(peak() - before)
"""
PARAMETERS = 60_000 * 768 + 514 * 768 + 4 * (4 * 768 * 768 + 2 * 768 * 3072)
SPARE = 100_000_000
"""What the libraries take once, whatever the model's size; less than any second copy of these weights would."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_bge(
        tmp_path_factory.mktemp("large"),
        tokenizer=False,
        vocab_size=60_000,
        hidden_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=3072,
    )


def measure(*arguments):
    result = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory(source):
    narrow, wide = 2 * PARAMETERS, 4 * PARAMETERS
    peaks = {
        "load bfloat16": (measure("load", source, "bfloat16"), narrow),
        "load float32": (measure("load", source, "float32"), wide),
        "convert bfloat16": (measure("convert", source, "bfloat16"), narrow),
        "convert float32": (measure("convert", source, "float32"), wide),
        "restore bfloat16": (measure("restore", source, "bfloat16"), narrow),
        "restore float32 as bfloat16": (measure("restore", source, "float32"), narrow),
        "load int8": (measure("round", source, "bfloat16"), PARAMETERS),
        "restore float32 as int8": (measure("restore int8", source, "float32"), PARAMETERS),
        "load over a mesh": (measure("load over a mesh", source, "bfloat16"), narrow),
        "restore over a mesh": (measure("restore over a mesh", source, "bfloat16"), narrow),
    }
    assert not {what: peak for what, peak in peaks.items() if not peak[1] <= peak[0] <= peak[1] + SPARE}
