"""Memory in pages of 2 MiB for what runs on a CPU.

XLA takes a program's working memory from the system anew at each call. Handed out in pages of 4 KiB, that costs a small
model's training step a fifth of its time. Linux's C library (glibc 2.35 and later) asks for larger ones by a setting
that it reads when a program starts.
"""

import os
import sys

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def restart_with_them():
    """Starts this Python program again, as the same process, with the setting; returns where that is not to be done.

    That is where the variable is set already, in whatever way, or the system is not Linux.
    """
    if sys.platform == "linux" and VARIABLE not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: SETTING})
