"""Every way to need less memory, as config per stage: quantise, cast, offload, stream, compile."""
