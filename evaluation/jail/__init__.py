"""The inside of evaluation/sandbox.py: what locks a program up, with nothing but the standard library and the kernel.

A jail is built in two steps. The room is a view of the system that holds little (bubblewrap's, or our own), made once
for each worker. In it waits a zygote: a Python that has imported the usual modules and nothing of a program. For each
run it forks two processes, which lock themselves up (namespaces, Landlock, seccomp, limits): one runs the program, one the
test, which asks the program for values through a channel. Then both die.

    settings.py   what a zygote is told            host.py      outside: starts a zygote, holds the clock
    room.py       the view of the file system      zygote.py    inside: one locked process for each run
    kernel.py     system calls by ctypes           program.py   inside one: the program, answering
    landlock.py   which files                      judge.py     inside the other: the test, asking; the token
    seccomp.py    which system calls               channel.py   between them: messages
    trial.py      whether a jail holds             values.py    what is in the messages
"""
