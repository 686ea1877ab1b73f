"""Models as folders that other libraries load; see `protoclip.export`."""
