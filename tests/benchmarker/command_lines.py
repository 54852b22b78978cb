"""Several command lines, one after the other in one process that imports everything once.

    python command_lines.py '[["run.py", ["--experiment_name", "x"]], ...]'

The last line printed is JSON: of each its exit code, and what it printed.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path


def call(script, arguments):
    said, sys.argv = io.StringIO(), [script, *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            if not isinstance(exit.code, str):
                return exit.code or 0, said.getvalue()
            print(exit.code)
        except BaseException:
            traceback.print_exc()
        else:
            return 0, said.getvalue()
    return 1, said.getvalue()


if __name__ == "__main__":
    lines = json.loads(sys.argv[1])
    sys.path.insert(0, str(Path(lines[0][0]).parent))
    print("", json.dumps([call(*line) for line in lines]), sep="\n")
