"""One file a method; the registry imports every module in here, so there is no list to edit."""
