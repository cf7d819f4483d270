"""Run by path, once a rank: a script or module as `python` runs it, but that what it dies of is left to the launcher.

Ranks that lose a peer die of that, all at once; only the launcher knows who was first. So an uncaught exception goes to
the file that torch's launchers have for it, TORCHELASTIC_ERROR_FILE, and not to stderr. Nothing of Hasten is imported.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
import time
import traceback


def main() -> None:
    how, target = sys.argv[1:3]
    sys.argv = [target, *sys.argv[3:]]
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)  # a line is one write
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if how == "module" else os.path.dirname(os.path.realpath(target))
    try:
        if how == "module":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        _leave(e, time.time_ns())
        sys.exit(1)


def _leave(e: Exception, raised: int) -> None:
    """The traceback, from the script's first line on, and when that was."""
    frames = e.__traceback__
    while (
        frames
        and frames.tb_frame.f_globals.get("__name__") in ("runpy", "importlib._bootstrap")
        or (frames and frames.tb_frame.f_code.co_filename == __file__)
    ):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(e), e.with_traceback(frames), frames))
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        sys.stderr.write(text)
        return
    with open(file + ".part", "w", encoding="utf-8", errors="backslashreplace") as part:
        json.dump({"message": text, "timestamp": raised // 10**9, "raised": raised}, part)
    os.replace(file + ".part", file)  # whoever sees it sees all of it


if __name__ == "__main__":
    main()
