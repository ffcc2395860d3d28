"""The CIFAR-10 trick ladder: the same small CNN, one trick more on each rung.

rungs.py       the rungs and the presets: the one place where a rung is added
recipe.py      what a rung may change about a training run

data.py        CIFAR-10 in either published version, download
synthetic.py   the stand-in for it
sampling.py    which images an epoch shows: imbalance, over- and under-sampling
augment.py     batched augmentation
mixing.py      mixup and CutMix

models.py      the networks, on fastnorm's layers or on torch.nn's
norms.py       what may stand between a convolution and its ReLU

optimisers.py  Adam, SGD, L1 and L2
schedules.py   learning rates
train.py       one rung: stages, epochs, steps
evaluate.py    loss and accuracy
averaging.py   predictions averaged over several passes
checks.py      what is looked at before training
checkpoint.py  files to go on from
processes.py   several processes under torchrun
allocator.py   what becomes of freed memory on a CPU

report.py      tables, results.json, results.csv
pictures.py    PNG
page.py        report.html
cli.py         the command line
"""
