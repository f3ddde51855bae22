"""The fuzzer of the containers: `make fuzz`."""
