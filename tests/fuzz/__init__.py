"""Property tests of every op of fastnorm.functional on the CPU: drawn calls against the references in float64.

tensors.py draws shapes, strides and numbers, norms.py and pointwise.py draw calls, bounds.py knows how far a right
answer may lie from the reference, call.py compares. tests/test_fuzz.py runs a few of them, ``python -m fuzz`` as many
as wanted.
"""
