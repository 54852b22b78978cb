"""Several command lines, one after the other in one process that imports everything once.

    python command_lines.py FILE

FILE holds [["run.py", ["--experiment_name", "x"], "folder to run it in"], ...] as JSON, and then
of each its exit code, and what it printed.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path


def call(script, arguments, folder):
    said, sys.argv = io.StringIO(), [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
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
    file = Path(sys.argv[1])
    file.write_text(json.dumps([call(*line) for line in json.loads(file.read_text())]))
