"""`python examples/retrieval COMMAND`: the modules are found whatever the current folder is."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from retrieval.commands import main

    sys.exit(main())
