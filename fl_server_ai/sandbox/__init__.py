"""Runs the programs of researchers, which are hostile until proven otherwise, in child processes that can do nothing else.

    worker                                      child: one program, no files, no network, no secrets
    SandboxPool.predict(program, inputs, plan)
      check: operators.py | exported.py         (before torch sees a byte of it)
      process.py -- frames over two pipes -->   child.py: lockdown.py, then loading.py, then drawing.py
      validates each answer <-- frames.py --

- `parent.py`     `SandboxPool`: warm children, least recently used out; the only door
- `process.py`    one child: start, deadline, kill; `channel.py` its pipes
- `programs.py`   what a program is; `plans.py` which draws it makes; `tensors.py` numbers without torch
- `operators.py`  the static check of TorchScript against `allowed_operators.py`
- `exported.py`   the static check of `torch.export` archives: no pickle, known operators, plain expressions
- `describing.py` layers and parameters, in the child; `descriptions.py` checks what it says of them
- `child.py`      the child's main, `pipes.py` its end; it alone imports torch, in `warming.py`, `loading.py`,
                  `exported_loading.py`, `describing.py` and `drawing.py`
- `remembering.py` whether a program could keep something from one call to the next
- `preparing.py`  an input before the program sees it, as `preparation.py` demands: `images.py` decodes PNG and JPEG,
                  `image_steps.py` carries out a pipeline
- `lockdown.py`   what the child gives up, reported to the worker; `landlock.py`, `seccomp.py`, `system.py` how
"""
