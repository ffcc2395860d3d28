#!/usr/bin/env python3
"""Train one small CNN on CIFAR-10 again and again, one trick more each time, and show what each trick bought.

python examples/cifar_ladder.py --help
"""

import sys

try:
    from ladder.cli import main
except ModuleNotFoundError as error:
    print(
        f"cifar_ladder.py: error: needs {error.name}; make installs what it needs, and so does "
        "pip install torch numpy matplotlib tqdm",
        file=sys.stderr,
    )
    sys.exit(2)
except KeyboardInterrupt:  # torch takes seconds to import
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
