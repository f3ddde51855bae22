"""What is done to inputs before a model sees them, as a list of steps that anybody can read.

Start with `steps.py`; nothing here needs torch.

- `steps.py`        the steps and their options; `fl_server_ai/sandbox/image_steps.py` carries them out
- `pipeline.py`     a JSON text or a list of steps, checked, in one canonical form
- `translation.py`  torchvision's pickled transforms as such a list; they are never unpickled
- `reading.py`      which of all that an uploaded file is
"""
