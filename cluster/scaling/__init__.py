"""The number of each stage's replicas, and which models sleep: policies that Serve's controller calls
continuously."""
