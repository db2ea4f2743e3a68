"""The inside of evaluation/sandbox.py: what locks a program up, with nothing but the standard library and the kernel.

A jail is built in two steps. The room is a view of the system that holds little (bubblewrap's, or our own), made once
for each worker. In it waits a zygote: a Python that has imported the usual modules and nothing of a program. For each
run it forks one process, which locks itself up (namespaces, Landlock, seccomp, limits), runs the program and dies.

    settings.py   what a zygote is told            host.py      outside: starts a zygote, holds the clock
    room.py       the view of the file system      zygote.py    inside: one locked process for each run
    kernel.py     system calls by ctypes           program.py   inside that: the program, its tests, the token
    landlock.py   which files                      seccomp.py   which system calls
"""
