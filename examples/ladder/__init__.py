"""The CIFAR-10 trick ladder: the same small CNN, one trick more on each rung.

rungs.py    the rungs and the presets: the one place where a rung is added
data.py     CIFAR-10 in either published version, download, the synthetic stand-in
augment.py  batched augmentation
models.py   the network, on fastnorm's layers or on torch.nn's
train.py    one rung: train, evaluate
report.py   table, results.json, pictures
cli.py      the command line
"""
