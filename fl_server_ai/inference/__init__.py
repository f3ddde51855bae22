"""Answers questions to models, in a worker: the program in its sandbox, the numbers here.

- `tasks.py`    what Celery calls; imports no torch
- `working.py`  one job: claim it, answer it, or say why not
- `counting.py` statistics of a program
- `draws.py`    which draws of the program a method needs, and with which weights
- `files.py`    the programs' files, open while they are asked often
- `pool.py`     this process's sandbox, made when it is first needed
"""
