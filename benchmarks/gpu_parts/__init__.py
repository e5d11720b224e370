"""The parts of benchmarks/gpu.py, each a process of its own: python -m benchmarks.gpu_parts NAME --output FOLDER

part.py         what every part does: rows that are saved at once, watched and timed
workloads.py    the lengths of the pairs that are scored
facts.py        versions, the card, its rates of copying and of matrix products
correctness.py  attention bodies against float64, toy models against the dense body
reference.py    the float64 attention
attention.py    attention alone
models.py       whole models: v2-m3, 0.6b, 8b
trace.py        a profile reduced to a table of kernels
pytorch.py      transformers' classes on the same lengths: torch, torch-compile
summary.py      what all of it says: the default, the marks, a table
"""
