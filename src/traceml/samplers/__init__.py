"""Numbers read every so often: process, host, devices, memory."""
