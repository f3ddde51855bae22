"""torch's zip archives, read without torch and without running anything that is in them.

Start with `reading.py`; `docs/explanation/safe-containers.md` has the picture.

- `archive.py`      the zip file: one folder, honest entries, CRCs
- `pickles.py`      the opcode interpreter; `records.py` what it leaves, `calls.py` what it refuses
- `tensors.py`      a pickled tensor: dtype, shape, strides and offset in a storage
- `names.py`        the names of `state_dict()`; `scripts.py` those of a TorchScript module
- `exports.py`      what a torch.export archive may hold, and its tensors
- `reading.py`      named tensors and their numbers
- `overwriting.py`  new numbers into a copy of the archive
"""
