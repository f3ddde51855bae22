"""One file a strategy; the registry imports every module in here, so there is no list to edit."""
