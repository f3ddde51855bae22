"""What changes data: `<noun>_<verb>` functions, keyword-only. Reading is in `selectors`."""
