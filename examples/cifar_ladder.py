#!/usr/bin/env python3
"""Train one small CNN on CIFAR-10 again and again, one trick more each time, and show what each trick bought.

python examples/cifar_ladder.py --help
"""

import sys

from ladder.cli import main

if __name__ == "__main__":
    sys.exit(main())
