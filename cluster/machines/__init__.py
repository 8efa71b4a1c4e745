"""The machines of a cluster: nodes, accelerators and their memory, and leases of a device."""
