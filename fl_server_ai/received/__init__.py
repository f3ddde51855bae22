"""From an update as it was sent to what is stored: whole canonical weights, and what came beside them.

Start reading here.

- `wanted.py`   what a training takes: its model's tensors, its strategy's extras, its patterns
- `form.py`     what a file says of itself: `kind`, `encoding` and `base_version`
- `names.py`    which tensors are weights, which are extras, which belong to an encoding
- `extras.py`   extras into one file of flat vectors, and a dictionary of numbers
- `weights.py`  weights of any kind and encoding into whole canonical weights
- `coded.py`    one tensor as it was sent, as blocks of numbers
- `numbers.py`  bytes to float64 and back, for every float dtype; no torch
- `store.py`    all of it, in order: what `services/updates.py` calls
"""
